"""Capture with vLLM equals capture with transformers: float32, 1e-4 in logits, ids up to ties. Run by `make test-vllm`.

Two kinds of engine: one inside this process, whose pooler and vision tower can be watched; and whole commands, where the engine
has processes of its own.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import vllm_families

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import RunError
from switchkd.losses import kneedle
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_lm_head
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker
from switchkd.pipelines.run_folder import SUMMARY
from switchkd.stores import TeacherStore
from switchkd.stores.verify import missing_parts, verify

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),  # an engine takes its time to start
    # vLLM's own, on a CPU
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
psutil = pytest.importorskip("psutil", reason="vLLM brings it")
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

TOLERANCE = 1e-4
CHUNK = 48  # tokens of a step, less than a prompt: every prompt is cut
BLOCK = 32  # tokens of a block of the prefix cache
WORDS = tiny.WORDS + [f"w{i}" for i in range(285)]
TRAINER = os.environ.get("SWITCHKD_TRAINER", sys.executable)  # a Python of the trainer's environment


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two teachers whose head dimension vLLM's CPU attention takes: SigLIP and a tied head, CLIP and an untied one."""
    folder = tmp_path_factory.mktemp("teachers")
    siglip = tiny.vision_config(size=32, patch=4, layers=3)  # 64 tokens an image
    clip = tiny.vision_config("clip", size=32, patch=8, layers=3)
    return {
        "siglip": tiny.checkpoint(folder / "siglip", 0, width=64, words=WORDS, vision=siglip, layer=-2),
        "clip": tiny.checkpoint(
            folder / "clip", 1, width=64, words=WORDS, vision=clip, layer=-2, strategy="default", tied=False, rows=320
        ),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Long and short, one and more turns, with and without image; images and whole samples come again."""
    random = np.random.default_rng(0)

    def text(words):
        return " ".join(f"w{i}" for i in random.integers(0, 285, words))

    rows = tiny.rows(16, text_only=(3, 9), two_turns=(5, 6, 9))
    for row, words in zip(rows, (1, 2, 5, 20, 40, 70, 3, 30, 1, 50, 60, 10, 5, 90, 2, 40), strict=True):
        row["conversations"][-1]["value"] = text(words)
    rows[5]["conversations"][1]["value"] = text(20)
    for again, first in ((10, 1), (11, 1), (12, 4)):
        rows[again]["image"] = rows[first]["image"]
    rows += [rows[5], rows[9], rows[13], rows[5]]
    return tiny.data(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture(scope="module")
def options(teachers, data):
    return CacheOptions(
        teacher=teachers["siglip"],
        data=data,
        images=data.parent / "images",
        out=data.parent / "unused.zarr",
        template="qa",
        payload="both",
        k=32,
        max_length=256,
        part_size=8,
    )


@pytest.fixture(scope="module")
def worker(options):
    return CaptureWorker(options)


@pytest.fixture(scope="module")
def encoded(worker):
    return [worker.encoder.encode(sample) for sample in worker.samples]


@pytest.fixture(scope="module")
def expected(worker, encoded):
    backend = TransformersBackend(worker.checkpoint, "cpu", "float32")
    return [payload for sample in encoded for payload in backend.capture([sample], worker.manifest)]


@pytest.fixture(scope="module")
def vllm(worker):
    """An engine in this process that cuts every prompt."""
    from switchkd.pipelines.capture.backends.vllm_backend import VllmBackend

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        settings = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 4, "block_size": BLOCK, "enforce_eager": True}
        yield VllmBackend(worker.checkpoint, "float32", 256, options=settings)


@pytest.fixture
def pieces(vllm, monkeypatch):
    """What the pooler sees: (first row, last row + 1, runs wanted)."""
    return vllm_families.watch_pieces(monkeypatch)


def assert_same(found, expected):
    """Within the tolerance; ids equal except where neighbours are closer than twice the tolerance."""
    assert len(found) == len(expected)
    stats = np.where(np.isneginf(expected.stats), 0, expected.stats)
    np.testing.assert_allclose(np.where(np.isneginf(found.stats), 0, found.stats), stats, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=TOLERANCE, rtol=1e-4)
    gaps = np.abs(np.diff(expected.logits, axis=1)) < 2 * TOLERANCE
    tied = np.pad(gaps, ((0, 0), (1, 0))) | np.pad(gaps, ((0, 0), (0, 1)), constant_values=True)
    assert (tied | (found.ids == expected.ids)).all()
    assert (found.ids == expected.ids).mean() > 0.99


def test_every_sample_is_what_transformers_says(vllm, worker, encoded, expected, pieces):
    """Images, text only, several turns; answers that lie across the borders of chunks."""
    for found, wanted in zip(vllm.capture(encoded, worker.manifest), expected, strict=True):
        assert_same(found, wanted)
    cut = [end for _, end, runs in pieces if any(begin < end < last for begin, last in runs)]
    assert len(cut) >= 5, "no answer was cut: the test tests nothing"
    assert max(end - begin for begin, end, _ in pieces) <= CHUNK


def test_a_prefix_from_the_cache_loses_no_row(vllm, worker, encoded, expected, pieces):
    """The same samples again: their prefixes are cached, into the answers; what has no hidden states is run once more."""
    again = [5, 17, 13, 5, 9]
    for _ in range(2):
        pieces.clear()
        captured = vllm.capture([encoded[index] for index in again], worker.manifest)
        for index, found in zip(again, captured, strict=True):
            assert_same(found, expected[index])
    firsts = {}
    for begin, _, runs in pieces:
        firsts.setdefault(str(runs), []).append(begin)
    assert any(min(begins) == 0 and max(begins) >= BLOCK for begins in firsts.values())
    assert any(begins[0] >= BLOCK for begins in firsts.values()), "no prefix came from the cache"


@pytest.mark.parametrize("payload", ("topk", "hidden"))
def test_either_payload(vllm, options, encoded, expected, payload):
    manifest = CaptureWorker(replace(options, payload=payload)).manifest
    for found, wanted in zip(vllm.capture(encoded[:6], manifest), expected, strict=False):
        assert (found.ids is None) == (payload == "hidden")
        assert (found.hidden is None) == (payload == "topk")
        for name in found.arrays().keys() - {"stats", "ids"}:
            np.testing.assert_allclose(found.arrays()[name], wanted.arrays()[name], atol=TOLERANCE, rtol=1e-4)


def test_batches_may_be_under_way_together(vllm, worker, encoded, expected):
    started = [vllm.start(encoded[first : first + 3], worker.manifest) for first in (0, 3, 6)]
    found = [payload for batch in started for payload in vllm.finish(batch)]
    for payload, wanted in zip(found, expected, strict=False):
        assert_same(payload, wanted)


def test_the_vision_tower_sees_the_trainers_pixels_bit_by_bit(vllm, worker, options, tmp_path):
    """Those of the trainer's environment, which has another transformers and no torchvision."""
    trainer = tmp_path / "pixels.pt"
    code = (
        "import sys, torch, transformers; from pathlib import Path\n"
        "from switchkd.data.encoding import SampleEncoder; from switchkd.data.samples import SampleFile\n"
        "from switchkd.data.templates import TEMPLATES; from switchkd.models.checkpoint import open_checkpoint\n"
        "teacher, data, out = map(Path, sys.argv[1:])\n"
        "encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES['qa'], data.parent / 'images', 256)\n"
        "media = [encoder.encode(sample).media for sample in SampleFile(data)]\n"
        "pixels = [None if columns is None else columns['pixel_values'][0] for columns in media]\n"
        "torch.save({'pixels': pixels, 'transformers': transformers.__version__}, out)\n"
    )
    run_python(code, options.teacher, options.data, trainer)
    saved = torch.load(trainer, weights_only=True)
    seen = []
    model = vllm.engine.model_executor.driver_worker.worker.model_runner.model
    hook = model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    fresh = SampleEncoder(open_checkpoint(options.teacher), TEMPLATES["qa"], options.images, 256)
    samples = [fresh.encode(sample) for sample in SampleFile(options.data)]
    for sample, pixels in zip(samples, saved["pixels"], strict=True):
        if pixels is not None:
            vllm.engine.reset_encoder_cache()
            vllm.engine.reset_prefix_cache()
            seen.clear()
            vllm.capture([sample], worker.manifest)
            (tower_input,) = seen
            assert torch.equal(tower_input[0], pixels)
    hook.remove()
    if sys.executable != TRAINER:
        import transformers

        assert saved["transformers"] != transformers.__version__, "two environments, one transformers: nothing compared"


def test_a_sample_beyond_the_teachers_positions_is_named(vllm, worker, encoded):
    sample = replace(encoded[3], input_ids=np.zeros(300, np.int32), supervised=np.ones(300, bool))
    with pytest.raises(RunError, match="300 tokens, and the teacher has 256 positions under vLLM"):
        vllm.capture([sample], worker.manifest)


# Whole commands: the engine has processes of its own


def run_python(code, *arguments):
    done = subprocess.run(
        [TRAINER, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment(TRAINER)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environment(python):
    """The shim on PYTHONPATH is for vLLM's environment alone."""
    kept = {name: value for name, value in os.environ.items() if python == sys.executable or name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def switchkd(python, *words, **variables):
    done = subprocess.run(
        [python, "-c", "from switchkd.cli.main import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(python) | variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def cache(python, teacher, data, out, *more, **variables):
    words = ("--teacher", teacher, "--data", data, "--images", data.parent / "images", "--out", out, "--template", "qa")
    sizes = ("--payload", "both", "--k", 32, "--max-length", 256, "--part-size", 8)
    fine = ("--fine", 1 / 4096, "--coarse", 1 / 4096, "--hidden-dtype", "float16")
    return switchkd(python, "cache-teacher", *words, *sizes, *fine, *more, **variables)


ENGINE = ("--backend", "vllm", "--vllm-option", "enforce_eager=true", "--batch-size", 5)


def assert_stores_agree(found, expected, backend):
    """What two stores hold: as near as the tolerance and the codec's steps allow."""
    a, b = TeacherStore(found), TeacherStore(expected)
    assert a.manifest.identity == b.manifest.identity
    assert a.manifest.written_by["backend"] == backend
    assert not missing_parts(a)
    assert not any(findings for _, findings in verify(a))
    for index in range(a.manifest.samples):
        assert a[index].digest == b[index].digest
        ours, theirs = a[index].payload, b[index].payload
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=TOLERANCE + 2 / 4096, rtol=0)
        np.testing.assert_allclose(ours.hidden, theirs.hidden, atol=TOLERANCE, rtol=2e-3)


def test_two_ways_to_the_same_store_and_training_takes_either(teachers, data, tmp_path):
    """The engine in its own process; its store has the identity of the trainer's environment, which trains from it."""
    made = {"vllm": tmp_path / "v.zarr", "transformers": tmp_path / "t.zarr"}
    said = cache(sys.executable, teachers["clip"], data, made["vllm"], *ENGINE)
    assert float(re.search(r"vLLM's final states are transformers' to (\S+) of their size", said)[1]) < 1e-5
    cache(TRAINER, teachers["clip"], data, made["transformers"])
    assert_stores_agree(made["vllm"], made["transformers"], "vllm")
    written_by = TeacherStore(made["vllm"]).manifest.written_by
    assert written_by["vllm"].startswith("0.")
    student = tiny.checkpoint(
        tmp_path / "student",
        3,
        words=WORDS,
        vision=tiny.vision_config("clip", size=32, patch=8),
        layer=-2,
        strategy="default",
    )
    losses = {}
    for name, store in made.items():
        words = (
            "--teacher",
            teachers["clip"],
            "--student",
            student,
            "--data",
            data,
            "--images",
            data.parent / "images",
        )
        run = tmp_path / f"run-{name}"
        steps = ("--steps", 2, "--batch-size", 4, "--log-every", 1)
        switchkd(TRAINER, "train", *words, "--cache", store, "--output", run, *steps)
        losses[name] = json.loads((run / SUMMARY).read_text())["losses"]
    assert losses["vllm"].keys() > {"loss_ce", "loss_align"}
    for name, loss in losses["vllm"].items():
        assert loss == pytest.approx(losses["transformers"][name], rel=1e-3), name


def test_a_bfloat16_teacher_is_stored_with_float32_logits(teachers, data, tmp_path):
    """Top-k logits and knees are those of the stored states times the LM head in float32, not of logits rounded to bfloat16."""
    kept = ("--dtype", "bfloat16", "--payload", "both", "--hidden-dtype", "bfloat16", "--k", 32)
    fine = ("--fine", 1e-3, "--coarse", 1e-3, "--check", 4)
    said = cache(sys.executable, teachers["siglip"], data, tmp_path / "s.zarr", *ENGINE, *kept, *fine)
    assert float(re.search(r"vLLM's final states are transformers' to (\S+) of their size", said)[1]) < 0.03
    store = TeacherStore(tmp_path / "s.zarr")
    payload = store.payload(range(len(store)))
    head = load_lm_head(open_checkpoint(teachers["siglip"]), "bfloat16")[: store.manifest.vocab_rows]
    exact = (torch.from_numpy(payload.hidden).double() @ head.double().T).float()
    found = torch.from_numpy(payload.logits)
    of_top = exact.gather(1, torch.from_numpy(payload.ids).long())
    torch.testing.assert_close(found, of_top, rtol=0, atol=3e-3)
    assert (of_top.bfloat16() - of_top).abs().max() > 6e-3  # otherwise the test shows nothing
    assert payload.stat("knee").tolist() == kneedle(exact).tolist()


def test_a_dry_run_probes_with_vllm(teachers, data, tmp_path):
    said = cache(sys.executable, teachers["siglip"], data, tmp_path / "s.zarr", *ENGINE, "--dry-run")
    for text in ("hours on the CPU", "random samples with vllm", "hidden, steps 0.02", "a live teacher takes about"):
        assert text in said
    assert not (tmp_path / "s.zarr").exists()


def test_the_engine_is_killed_and_the_store_is_finished_all_the_same(teachers, tmp_path):
    rows = tiny.rows(1000)
    for index, row in enumerate(rows):
        row["image"] = f"{index % 20:03d}.png"
    data = tiny.data(tmp_path / "data", rows)
    out = tmp_path / "s.zarr"
    more = ("--part-size", 10, "--batch-size", 5)
    command = [sys.executable, "-c", "from switchkd.cli.main import main; main()", "cache-teacher", *ENGINE]
    command += ["--teacher", teachers["siglip"], "--data", data, "--images", data.parent / "images", "--out", out]
    command += ["--template", "qa", "--max-length", 256, *more]
    with subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment(sys.executable)
    ) as process:
        deadline = time.monotonic() + 300
        while not (out / "parts/00001").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        # vLLM names its processes.
        (engine,) = [child for child in psutil.Process(process.pid).children() if "EngineCore" in child.cmdline()[0]]
        engine.kill()
        errors = process.communicate()[1]
    assert process.returncode == 1, errors
    assert "Error: vLLM's engine died" in errors
    assert 1 < len(TeacherStore(out).parts()) < 100
    words = ("--teacher", teachers["siglip"], "--data", data, "--images", data.parent / "images", "--out", out)
    switchkd(TRAINER, "cache-teacher", *words, "--template", "qa", "--max-length", 256, *more)
    store = TeacherStore(out)
    store.check_complete()
    assert not any(findings for _, findings in verify(store))


def test_tensor_parallel_workers_share_the_teacher(teachers, data, tmp_path):
    """A store that transformers began and vLLM on two workers finished."""
    store, whole = tmp_path / "s.zarr", tmp_path / "t.zarr"
    cache(TRAINER, teachers["siglip"], data, store, "--shard", "1/3")
    cache(TRAINER, teachers["siglip"], data, whole)
    said = cache(
        sys.executable,
        teachers["siglip"],
        data,
        store,
        *ENGINE,
        "--tensor-parallel",
        2,
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert "2 parts written, 1 there before" in said
    assert_stores_agree(store, whole, "transformers")
