"""Stage one: what is stored is what the teacher says, whatever the batches, and bad samples are counted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import families
import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from switchkd.counting import counted
from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError, DataError, RunError, StoreMismatch
from switchkd.losses import kneedle, selection
from switchkd.losses.selection import knee_of_sorted
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_lm_head, load_model, states_at_positions
from switchkd.pipelines.capture.backends import packed_rows
from switchkd.pipelines.capture.backends.packed_rows import pack, pack_logits, unpack
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.sharding import resolve_shard
from switchkd.pipelines.capture.worker import CaptureWorker
from switchkd.pipelines.progress import Progress
from switchkd.positions import predicting_rows
from switchkd.stores import StoreTables, TeacherStore


@pytest.fixture
def options(teacher, tmp_path):
    data = tiny.data(tmp_path / "data", tiny.rows(11, text_only=(3,), two_turns=(5, 6)))
    return CacheOptions(
        teacher=teacher,
        data=data,
        images=tmp_path / "data/images",
        out=tmp_path / "s.zarr",
        template="qa",
        part_size=4,
        batch_size=3,
        fine=1 / 1024,
        coarse=1 / 1024,
    )


def live_logits(options, index):
    """The teacher's rows for one sample, alone in its batch."""
    opened = open_checkpoint(options.teacher)
    encoder = SampleEncoder(opened, TEMPLATES[options.template], options.images, options.max_length)
    batch = collate([encoder.encode(SampleFile(options.data)[index])], 0)
    batch.pop("has_image")
    rows = predicting_rows(batch.pop("labels"))
    with torch.no_grad():
        return load_model(opened)(**batch).logits[rows]


@pytest.mark.parametrize("index", (0, 3, 5, 10))
def test_the_store_holds_what_the_teacher_says(options, index):
    cache_teacher(options)
    stored, live = TeacherStore(options.out)[index].payload, live_logits(options, index)
    dense = np.empty(live.shape, np.float32)
    np.put_along_axis(dense, stored.ids, stored.logits, -1)  # k covers this small vocabulary
    assert np.abs(dense - live.numpy()).max() < 1 / 2048 + 1e-5
    assert stored.stat("knee").tolist() == kneedle(live).tolist()
    np.testing.assert_allclose(stored.stat("logsumexp"), live.logsumexp(-1), atol=1 / 2048 + 1e-5)


def test_batches_do_not_change_what_is_stored(options):
    cache_teacher(options)
    other = replace(options, out=options.out.with_name("o.zarr"), batch_size=7, workers=2)
    cache_teacher(other)
    for index in range(11):
        a, b = TeacherStore(options.out)[index], TeacherStore(other.out)[index]
        assert a.digest == b.digest
        np.testing.assert_allclose(np.sort(a.payload.logits), np.sort(b.payload.logits), atol=2 / 1024)


@pytest.mark.parametrize("dtype", ("steps", "float16", "bfloat16"))
def test_hidden_states_give_the_teachers_logits_back(options, dtype):
    cache_teacher(replace(options, payload="hidden", hidden_dtype=dtype, hidden_error=0.001))
    head = load_lm_head(open_checkpoint(options.teacher), "float32")
    for index in (0, 3, 5):
        stored, live = TeacherStore(options.out)[index].payload, live_logits(options, index)
        assert stored.ids is None
        error = (torch.from_numpy(stored.hidden.copy()) @ head.T - live).abs().max() / live.abs().max()
        assert error < {"steps": 3e-2, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
        assert stored.stat("knee").tolist() == kneedle(live).tolist()


def test_a_bfloat16_teacher_is_stored_with_float32_logits(options, monkeypatch):
    """Statistics, knees and top-k are those of its states times its LM head, not of logits rounded to bfloat16."""
    seen = []

    def watched(model, columns):
        seen.append((states_at_positions(model, columns), model.lm_head.weight))
        return seen[-1][0]

    monkeypatch.setattr("switchkd.pipelines.capture.backends.transformers_backend.states_at_positions", watched)
    cache_teacher(replace(options, dtype="bfloat16", batch_size=1, payload="both", k=5))
    store = TeacherStore(options.out)
    assert store.manifest.teacher["dtype"] == "bfloat16"
    payloads = [store[index].payload for index in range(11)]
    alone = seen[-11:]  # before them come the passes of the rank table
    assert all(states.dtype == head.dtype == torch.bfloat16 for states, head in alone)
    exact = [(states.double() @ head.double().T).float() for states, head in alone]
    for logits in exact:
        largest = logits.amax(-1).numpy()
        payload = next(p for p in payloads if len(p) == len(logits) and np.abs(p.stat("z_max") - largest).max() < 1e-3)
        assert payload.stat("knee").tolist() == kneedle(logits).tolist()
        np.testing.assert_allclose(payload.logits, logits.gather(-1, torch.from_numpy(payload.ids).long()), atol=1e-3)
    assert max((logits.bfloat16() - logits).abs().max() for logits in exact) > 3e-3  # otherwise the test shows nothing


@pytest.mark.parametrize("payload", ("topk", "hidden"))
def test_ids_with_holes_are_rows_in_use(options, tmp_path, payload):
    """The tokenizer has 15 entries, and its largest id is 24: the rows of its last tokens are the teacher's, too."""
    ids = [*range(4), *range(14, 25)]
    words = Tokenizer(models.WordLevel(dict(zip(tiny.WORDS, ids, strict=True)), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "extra_special_tokens": ["<image>"]}
    holed = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    assert (len(holed), max(holed.get_vocab().values())) == (15, 24)
    teacher = tiny.checkpoint(tmp_path / "holed", 3, rows=32, words_of=holed)
    options = replace(options, teacher=teacher, payload=payload, k=25)
    cache_teacher(options)
    store = TeacherStore(options.out)
    assert store.manifest.vocab_rows == 25
    live = live_logits(options, 5)[:, :25]
    np.testing.assert_allclose(store[5].payload.stat("logsumexp"), live.logsumexp(-1), atol=1e-3)
    if payload == "topk":
        assert (np.sort(store[5].payload.ids) == np.arange(25)).all()


def test_both_payloads_side_by_side(options):
    cache_teacher(replace(options, payload="both"))
    payload = TeacherStore(options.out)[5].payload
    assert payload.ids.shape == (5, 15)
    assert payload.hidden.shape == (5, 32)


def test_running_again_writes_nothing(options):
    first, again = cache_teacher(options), cache_teacher(options)
    assert (first.parts_written, first.samples, first.positions) == (3, 11, 28)
    assert (again.parts_written, again.parts_already_there, again.parts_missing) == (0, 3, 0)


def test_shards_fill_one_store(options):
    first = cache_teacher(replace(options, shard=(1, 2)))
    assert (first.parts_written, first.parts_missing) == (1, 2)
    second = cache_teacher(replace(options, shard=(0, 2)))
    assert (second.parts_written, second.parts_missing) == (2, 0)
    TeacherStore(options.out).check_complete()


def test_bad_samples_are_recorded_and_counted(options):
    rows = tiny.rows(9)
    rows[1]["image"] = "nowhere.png"
    rows[2]["image"] = "../data.json"
    rows[3]["conversations"] = []
    rows[4]["conversations"][0]["from"] = "robot"
    rows[5]["conversations"][0]["value"] += "<image>"
    rows[6]["conversations"][1]["value"] = "red " * 200
    data = tiny.data(options.data.parent / "bad", rows, images=False)
    for i in (0, 4, 5, 6, 7, 8):
        tiny.image(data.parent / f"images/{i:03d}.png", i)
    (data.parent / "images/007.png").write_bytes(b"no image")
    done = cache_teacher(replace(options, data=data, images=data.parent / "images", max_length=64, max_skipped=1))
    assert done.samples == 2
    assert Counter(done.skipped) == Counter(
        image_missing=1,
        image_outside_folder=1,
        no_conversation=1,
        unknown_role=1,
        several_images=1,
        too_long=1,
        image_unreadable=1,
    )
    store = TeacherStore(options.out)
    assert [len(store[i].payload) > 0 for i in range(9)] == [True, *[False] * 7, True]


def test_strict_stops_at_the_first_bad_sample(options):
    (options.images / "002.png").unlink()
    with pytest.raises(BadSample, match=r"image_missing: row 2: no image .*002\.png"):
        cache_teacher(replace(options, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "k: store 15, here 6"),
        ({"template": "plain"}, "template name: store 'qa', here 'plain'"),
        ({"coarse": 0.5}, "coarsest step: store 0.0009765625, here 0.5"),
        ({"part_size": 5}, "part size: store 4, here 5"),
    ],
)
def test_other_settings_are_refused_by_name(options, change, message):
    cache_teacher(options)
    with pytest.raises(StoreMismatch, match=message):
        cache_teacher(replace(options, **change))


def test_another_teacher_of_equal_shape_is_refused(options, tmp_path):
    cache_teacher(options)
    other = tiny.checkpoint(tmp_path / "other", seed=9, width=32)
    with pytest.raises(StoreMismatch, match="teacher language: store"):
        cache_teacher(replace(options, teacher=other))


def test_a_teacher_with_other_logits_is_refused(options, tmp_path):
    """The same weights with another soft-cap of the logits."""
    teacher = families.write_checkpoint("paligemma2", tmp_path / "paligemma", 0)
    options = replace(options, teacher=teacher, payload="hidden", max_length=2048)
    cache_teacher(options)
    config = json.loads((teacher / "config.json").read_text())
    assert config["text_config"]["final_logit_softcapping"] == 3.0
    config["text_config"]["final_logit_softcapping"] = 4.0
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        StoreMismatch, match="teacher logit_map: store 'scale 1, soft-cap 3', here 'scale 1, soft-cap 4'"
    ):
        cache_teacher(options)


def test_an_edited_data_file_is_refused(options):
    cache_teacher(options)
    options.data.write_text(options.data.read_text().replace("circle", "square", 1))
    with pytest.raises(StoreMismatch, match="data file: store"):
        cache_teacher(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine": 0.5}, "0 < fine <= coarse is needed, got fine = 0.5"),
        ({"out": "s.zip"}, "a store's name ends in .zarr"),
        ({"shard": (2, 2)}, "shard 2/2"),
        ({"device": "cuda:9"}, "device 'cuda:9' cannot be used"),
    ],
)
def test_wrong_options_are_refused_before_the_teacher_loads(options, change, message, tmp_path):
    if "out" in change:
        change = {"out": tmp_path / change["out"]}
    with pytest.raises(ConfigError, match=message):
        cache_teacher(replace(options, **change))


def test_a_missing_image_folder_is_an_error(options, tmp_path):
    with pytest.raises(DataError, match="no image folder"):
        cache_teacher(replace(options, images=tmp_path / "nowhere"))


def test_images_without_a_folder_are_an_error(options):
    with pytest.raises(DataError, match=r"row 0 has the image '000\.png': --images must name"):
        cache_teacher(replace(options, images=None))


def test_logits_that_are_not_finite_name_the_sample(options, monkeypatch):
    def poisoned(logits, top_k, hidden=None):
        logits = logits.clone()
        logits[:, 3] = torch.where(logits[:, 10] > logits[:, 11], logits[:, 3], torch.nan)
        return pack_logits(logits, top_k)

    monkeypatch.setattr("switchkd.pipelines.capture.backends.packed_rows.pack_logits", poisoned)
    options = replace(options, payload="topk")
    monkeypatch.setattr(
        "switchkd.pipelines.capture.worker.probe_tables", lambda *_: StoreTables(np.arange(15, dtype=np.uint32))
    )
    bad = [i for i in range(11) if not (lambda z: (z[:, 10] > z[:, 11]).all())(live_logits(options, i))]
    assert bad
    with pytest.raises(
        RunError, match=r"row \d+: the teacher's logits are not finite; nothing of its part was stored"
    ) as caught:
        cache_teacher(options)
    assert int(str(caught.value).split()[1].rstrip(":")) in bad


@pytest.mark.parametrize("keep_hidden", (False, True))
@pytest.mark.parametrize("top_k", (0, 8))
def test_packing_in_pieces_changes_nothing(top_k, keep_hidden, monkeypatch):
    """Of 23 rows, 7 make logits at a time, and 3 are selected from at a time."""
    states, head = (
        torch.randn(*size, generator=torch.Generator().manual_seed(0)).double() for size in ((23, 6), (6, 50))
    )
    whole = pack(states, lambda chunk: chunk @ head, 40, top_k, keep_hidden)
    monkeypatch.setattr(packed_rows, "LOGIT_ROWS", {"cpu": 7})
    monkeypatch.setattr(selection, "BLOCK_LOGITS", {"cpu": 3 * 40})
    chunks = []

    def counted(chunk):
        chunks.append(len(chunk))
        return chunk @ head

    pieces = pack(states, counted, 40, top_k, keep_hidden)
    assert chunks == [7, 7, 7, 2]
    bits = slice(5, 5 + top_k)  # ids, which are no numbers
    assert torch.equal(pieces[:, bits].view(torch.int32), whole[:, bits].view(torch.int32))
    torch.testing.assert_close(
        torch.cat([pieces[:, :5], pieces[:, 5 + top_k :]], -1), torch.cat([whole[:, :5], whole[:, 5 + top_k :]], -1)
    )


def test_progress_counts_the_requests_that_are_kept_ahead(options, monkeypatch):
    """A backend that takes three batches of 2 samples ahead has 4 of them left when the first is done; 10 of 11 can be used."""
    monkeypatch.setattr(TransformersBackend, "ahead", 3)
    seen = []
    advance = Progress.advance

    def watched(self, *args, **more):
        seen.append(self.ahead)
        advance(self, *args, **more)
        assert not self.ahead or f", {counted(self.ahead, 'request')} ahead" in self._rate()

    monkeypatch.setattr(Progress, "advance", watched)
    worker = CaptureWorker(replace(options, part_size=12, batch_size=2))
    with Progress("caching", 11, "samples") as progress:
        list(worker.write([0], progress))
    assert len(seen) == 6 and seen[:3] == [4, 4, 4] and seen[-1] == 0


@pytest.mark.parametrize(("rows", "top_k"), [(50, 8), (50, 0), (50, 50), (2, 1), (5000, 128)])
def test_packing_keeps_statistics_of_the_whole_row(rows, top_k):
    logits = torch.randn(6, rows, generator=torch.Generator().manual_seed(0)) * 4
    hidden = torch.randn(6, 3)
    packed = unpack(pack_logits(logits, top_k, hidden), top_k)
    ordered = logits.sort(descending=True).values
    if top_k:
        np.testing.assert_array_equal(packed.logits, ordered[:, :top_k])
        np.testing.assert_array_equal(logits.gather(1, torch.from_numpy(packed.ids).long()), ordered[:, :top_k])
    else:
        assert packed.ids is None and packed.logits is None
    np.testing.assert_array_equal(packed.hidden, hidden)
    tail = ordered[:, top_k:].logsumexp(-1)
    expected = torch.stack(
        [ordered[:, 0], ordered[:, -1], logits.logsumexp(-1), tail, knee_of_sorted(ordered).float()], -1
    )
    np.testing.assert_allclose(packed.stats, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_one_logit_that_is_not_finite_is_seen(bad):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[4, 17] = bad
    with pytest.raises(RunError, match="not finite"):
        unpack(pack_logits(logits, 8), 8)


def test_interrupting_keeps_what_was_committed(options, tmp_path):
    """Ctrl-C in the middle: exit code 130, one line, and the same command finishes the store."""
    data = tiny.data(tmp_path / "many", tiny.rows(120))
    words = ["cache-teacher", "--teacher", options.teacher, "--data", data, "--images", data.parent / "images"]
    words += ["--out", options.out, "--template", "qa", "--part-size", 2, "--batch-size", 1]
    command = [sys.executable, "-c", "from switchkd.cli.main import main; main()", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not (options.out / "parts/00003").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; run the same command again" in errors
    assert "Traceback" not in errors
    there = len(TeacherStore(options.out).parts())
    assert 3 < there < 60
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f"{60 - there} parts written, {there} there before" in again.stdout
    assert len(TeacherStore(options.out)[119].payload) == 2


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ("1/4", {"RANK": "0", "WORLD_SIZE": "2"}, ((1, 4), "--shard")),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"},
            ((2, 4), "Slurm's array"),
        ),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"},
            ((3, 4), "Slurm's array"),
        ),
        (None, {"RANK": "1", "WORLD_SIZE": "2"}, ((1, 2), "RANK and WORLD_SIZE")),
        (None, {}, ((0, 1), "one worker")),
    ],
)
def test_the_shard_comes_from_the_first_that_says_so(given, environment, expected):
    assert resolve_shard(given, environment) == expected


@pytest.mark.parametrize("given", ("4", "4/4", "a/b", "-1/3", "1/0"))
def test_a_shard_that_makes_no_sense_is_refused(given):
    with pytest.raises(ConfigError, match="a shard is I/N with 0 ≤ I < N"):
        resolve_shard(given, {})


def test_the_manifest_is_plain_json(options):
    cache_teacher(options)
    attributes = json.loads((options.out / "zarr.json").read_text())["attributes"]["switchkd"]
    assert attributes["format"] == "switchkd-store"
    assert attributes["statuses"]["8"] == "image_missing"
    assert attributes["written_by"]["backend"] == "transformers"
