"""The visual advantage in a store: the numbers of two plain forward passes, resumed, verified, exported, and refused by name."""

import json
import shutil

import families
import numpy as np
import pyarrow.parquet as parquet
import pytest
import tiny
import torch
import zarr
from click.testing import CliRunner
from transformers import LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError, RunError, StoreError, StoreMismatch
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.dry_run import plan
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.visual_advantage import BLUR, blurred_encoder
from switchkd.stores import Payload, TeacherStore
from switchkd.stores.codec import encode_advantage
from switchkd.stores.parquet import export_parquet
from switchkd.stores.verify import _payload_problems, repair, verify


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):
    """A data file with text-only, two-turn and unusable rows; its stores with and without visual advantages."""
    folder = tmp_path_factory.mktemp("looking")
    data = tiny.data(folder, tiny.rows(11, text_only=(1, 8), two_turns=(2,)))
    rows = json.loads(data.read_text())
    rows[4]["conversations"] = []
    data.write_text(json.dumps(rows))
    for name, looks in (("with", True), ("without", False)):
        cache_teacher(options_of(folder, teacher, name, visual_advantage=looks))
    return folder


def options_of(folder, teacher, name, **more):
    given = {"teacher": teacher, "data": folder / "data.json", "images": folder / "images", "template": "qa"}
    return CacheOptions(out=folder / f"{name}.zarr", part_size=3, k=5, batch_size=2, **given | more)


def by_loop(folder, teacher, sample):
    """log p of each supervised token with the sharp and the blurred image, token by token in float64; [P]."""
    checkpoint = open_checkpoint(teacher)
    model = LlavaForConditionalGeneration.from_pretrained(teacher).double().eval()
    sharp = SampleEncoder(checkpoint, TEMPLATES["qa"], folder / "images", 2048)
    sides = []
    for encoder in (sharp, blurred_encoder(sharp)):
        encoded = encoder.encode(sample)
        pixels = {} if encoded.media is None else {"pixel_values": encoded.media["pixel_values"].double()}
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(encoded.input_ids).long()[None], **pixels).logits[0]
        logits = logits[:, : checkpoint.vocab_rows]
        at = np.flatnonzero(encoded.supervised[1:])
        sides.append([logits[row].log_softmax(-1)[encoded.input_ids[row + 1]].item() for row in at])
    return np.subtract(*sides)


def test_it_is_that_of_two_plain_forward_passes(place, teacher):
    store, samples = TeacherStore.open(place / "with.zarr"), SampleFile(place / "data.json")
    assert store.manifest.visual_advantage == BLUR == 1 / 16
    differs = False
    for index in (0, 1, 2, 7, 8, 10):
        found, expected = store[index].visual_advantage, by_loop(place, teacher, samples[index])
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=2e-5)
        assert len(found) == len(store[index].payload)
        assert samples[index].images or not found.any()  # a row without an image has 0
        differs |= bool(np.abs(found).max() > 1e-3)
    assert differs


def test_nothing_else_of_the_store_differs(place):
    """All other arrays are the same files, and so is the identity that a part records."""
    with_, without = (TeacherStore.open(place / f"{name}.zarr") for name in ("with", "without"))
    assert with_.manifest.identity == without.manifest.identity
    assert "visual_advantage" not in without.manifest.as_attributes()
    for part in range(4):
        files = with_.part_entry(part)["files"], without.part_entry(part)["files"]
        assert {name: about for name, about in files[0].items() if not name.startswith("visual_advantage")} == files[1]
    sample = without[0]
    with pytest.raises(StoreError, match="keeps no visual_advantage"):
        _ = sample.visual_advantage
    assert with_.only("hidden").payload([0]).visual_advantage is None


def test_any_zarr_reader_reads_it(place):
    store = TeacherStore.open(place / "with.zarr")
    part = zarr.open_group(place / "with.zarr", mode="r")["parts/00000"]
    begin, end = part["samples/offset"][2:4]
    assert part["visual_advantage"].dtype == np.float16
    np.testing.assert_array_equal(part["visual_advantage"][begin:end], store[2].visual_advantage)


def test_a_resumed_capture_writes_the_same_bytes(place, teacher):
    options = options_of(place, teacher, "again", visual_advantage=True)
    shutil.copytree(place / "with.zarr", options.out)
    shutil.rmtree(options.out / "parts/00002")
    cache_teacher(options)
    for file in (place / "with.zarr/parts/00002/visual_advantage").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (options.out / file.relative_to(place / "with.zarr")).read_bytes()


def test_loader_processes_and_batch_sizes_change_nothing(place, teacher):
    options = options_of(place, teacher, "loaded", visual_advantage=True, workers=1)
    cache_teacher(options)
    mine, theirs = (TeacherStore.open(place / f"{name}.zarr").payload(range(11)) for name in ("loaded", "with"))
    np.testing.assert_array_equal(mine.visual_advantage, theirs.visual_advantage)


@pytest.mark.parametrize(("begun", "looks"), (("without", True), ("with", False)))
def test_a_store_is_not_resumed_with_another_setting(place, teacher, begun, looks):
    with pytest.raises(StoreMismatch, match=r"blur of the visual advantage \(0: none is stored\): store 0"):
        cache_teacher(options_of(place, teacher, begun, visual_advantage=looks))


def test_vllm_is_refused_before_anything_is_opened(place, teacher):
    with pytest.raises(ConfigError, match="--visual-advantage .* pass --backend transformers"):
        options_of(place, teacher, "never", visual_advantage=True, backend="vllm")


def test_damage_is_found_and_repaired(place, teacher, tmp_path):
    store = tmp_path / "s.zarr"
    shutil.copytree(place / "with.zarr", store)
    file = store / "parts/00001/visual_advantage/c/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 0xFF
    file.write_bytes(data)
    found = {part: findings for part, findings in verify(TeacherStore(store)) if findings}
    assert list(found) == [1] and "visual_advantage" in found[1][0].message
    assert repair(TeacherStore(store)).dropped == [1]
    store_of = TeacherStore.open(place / "with.zarr")
    arrays = store_of.part_payload(0).arrays()
    arrays["visual_advantage"][0] = np.nan
    problems = list(_payload_problems(Payload(**arrays), store_of.manifest, store_of.hidden_steps))
    assert problems == [f"a visual advantage is not finite (1 of {len(arrays['stats'])} positions)"]


def test_it_is_exported(place, tmp_path):
    store = TeacherStore.open(place / "with.zarr")
    list(export_parquet(store, tmp_path))
    for index, row in enumerate(parquet.read_table(tmp_path).to_pylist()):
        wanted = None if store[index].status else store[index].visual_advantage.tolist()
        assert row["visual_advantage"] == wanted


def test_info_tells_it(place):
    for name, there in (("with", True), ("without", False)):
        done = CliRunner().invoke(main, ["store", "info", str(place / f"{name}.zarr")])
        assert done.exit_code == 0 and ("visual advantage, blur 0.0625" in done.output) is there


def test_a_dry_run_counts_the_second_pass(place, teacher):
    found = plan(options_of(place, teacher, "never", visual_advantage=True))
    without = plan(options_of(place, teacher, "never"))
    assert found.bytes_per_position > without.bytes_per_position


def test_a_blurred_image_at_which_the_teacher_fails_ends_the_capture(place, teacher, monkeypatch):
    from switchkd.pipelines.capture.backends import transformers_backend as module

    monkeypatch.setattr(module, "advantages", lambda *given: torch.full((len(given[3]),), torch.nan))
    with pytest.raises(RunError, match=r"row \d+: the teacher's logits are not finite where the image is blurred"):
        cache_teacher(options_of(place, teacher, "failing", visual_advantage=True))


@pytest.mark.parametrize("family", ("qwen2_5_vl", "internvl"))
def test_other_families(family, tmp_path):
    folder = families.write_checkpoint(family, tmp_path / "model", 0)
    data = tiny.data(tmp_path / "data", tiny.rows(4, text_only=(2,)))
    given = {"teacher": folder, "data": data, "images": data.parent / "images", "template": "qa"}
    cache_teacher(CacheOptions(out=tmp_path / "s.zarr", visual_advantage=True, payload="topk", k=4, **given))
    store = TeacherStore.open(tmp_path / "s.zarr")
    assert not store[2].visual_advantage.any() and store[0].visual_advantage.any()


def test_what_float16_cannot_hold_is_refused():
    assert encode_advantage(np.array([1.5, -3e-8], np.float32)).tolist() == [1.5, -5.960464477539063e-08]
    for bad, message in ((np.nan, "not finite"), (np.inf, "not finite"), (7e4, "does not fit float16")):
        with pytest.raises(ValueError, match=message):
            encode_advantage(np.array([bad], np.float32))


def test_the_teacher_runs_once_without_images(place, teacher, monkeypatch):
    """A batch of text alone costs no second pass."""
    from switchkd.pipelines import visual_advantage as module

    backend = TransformersBackend(open_checkpoint(teacher), "cpu", "float32")
    store = TeacherStore.open(place / "with.zarr")
    encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], place / "images", 2048)
    monkeypatch.setattr(module, "states_at_positions", lambda *_: pytest.fail("a second pass"))
    (found,) = backend.capture([encoder.encode(SampleFile(place / "data.json")[1])], store.manifest)
    assert not found.visual_advantage.any()
