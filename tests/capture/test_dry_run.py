"""`cache-teacher --dry-run`: estimates from a probe, and nothing written."""

import math
import time
from dataclasses import replace

import mixtures
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.cache_teacher import _print_plan
from switchkd.cli.main import main
from switchkd.errors import CheckpointError, DataError
from switchkd.pipelines.capture import dry_run
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.backends.vllm_parity import LeftOut
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.dry_run import Plan, paying_passes, plan
from switchkd.pipelines.capture.mixture import plan_mixture
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.mixture import read_mixture
from switchkd.stores import TeacherStore
from switchkd.stores.info import describe


@pytest.fixture
def options(teacher, tmp_path):
    rows = tiny.rows(60, text_only=(3,), two_turns=range(0, 60, 3))
    data = tiny.data(tmp_path / "data", rows)
    (data.parent / "images/007.png").write_bytes(b"x")
    return CacheOptions(teacher, data, tmp_path / "s.zarr", data.parent / "images", template="qa", part_size=60)


@pytest.mark.parametrize(
    ("payload", "dtype"),
    [
        ("topk", None),
        ("hidden", "float16"),
        ("hidden", "bfloat16"),
        ("hidden", "steps"),
        ("both", "bfloat16"),
        (None, None),
    ],
)
def test_the_plan_is_what_the_capture_then_takes(options, payload, dtype):
    options = replace(options, payload=payload, hidden_dtype=dtype, hidden_error=0.02 if payload else 0.005)
    found = plan(options)  # 60 samples: the probe sees all of them
    assert not options.out.exists()
    cache_teacher(options)
    made = describe(options.out)
    assert (found.samples, found.usable_samples, found.positions) == (60, made.samples, made.positions)
    assert found.bytes_per_position == pytest.approx(made.bytes_per_position, rel=0.05)
    assert found.seconds > 0 and found.free_bytes > 0
    steps = ["hidden, steps 0.01", "hidden, steps 0.02", "hidden, steps 0.04"]
    assert list(found.payload_bytes)[:6] == ["topk", *steps, "hidden, float16", "hidden, bfloat16"]
    sizes = [found.payload_bytes[name] for name in steps]
    assert sizes == sorted(sizes, reverse=True)
    expected = {("both", "bfloat16"): "both, bfloat16", (None, None): "both, steps 0.005", ("topk", None): "topk"}
    form = f"hidden, {dtype}{' 0.02' if dtype == 'steps' else ''}"
    assert found.payload == expected.get((payload, dtype), form)
    assert found.trained_from == found.payload.replace("both", "hidden")
    assert found.store_bytes() == round(found.positions * found.bytes_per_position)


def plan_of(**changed):
    fields = {
        "samples": 665_298,
        "usable_samples": 664_943,
        "positions": 60_000_000,
        "payload": "both, steps 0.02",
        "trained_from": "hidden, steps 0.02",
        "payload_bytes": {
            "topk": 50.0,
            "hidden, steps 0.02": 200.0,
            "both, steps 0.02": 250.0,
            "hidden, float16": 2200.0,
        },
        "free_bytes": None,
        "samples_per_second": 20.0,
        "seconds": 36_000.0,
        "devices": 4,
        "on_gpu": True,
        "probed_samples": 64,
        "live_seconds": 27_000.0,
        "read_seconds": 900.0,
    }
    return Plan(**(fields | changed))


def test_device_hours_and_egress_are_arithmetic(options, monkeypatch, capsys):
    """60 million positions of 250 bytes are 15 GB, of which training reads 12; ten hours on four devices are 40 GPU hours."""
    monkeypatch.setattr("switchkd.pipelines.capture.dry_run.plan", lambda _: plan_of())
    _print_plan(replace(options, out="s3://bucket/s.zarr"), egress_price=0.05)
    said = capsys.readouterr().out
    assert "about 40.00 GPU hours: 20.0 samples/s a worker of 4 devices" in said
    assert "about 15.000 GB (both, steps 0.02), 250 bytes a position" in said
    assert "about $0.60 to train from it for one epoch (hidden, steps 0.02) outside, at $0.05 a GB" in said
    assert "132.000 GB" in said
    _print_plan(options, egress_price=0.05)
    assert "egress" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capture", "live", "read"), [(10, 9, 1), (10, 5, 0), (10, 5, 4.9), (1, 5, 0), (8, 4, 2), (5, 1, 1), (5, 1, 3)]
)
def test_a_store_pays_from_the_first_pass_at_which_the_sums_say_so(capture, live, read):
    sums = [n for n in range(1, 500) if capture + n * read < n * live]
    assert paying_passes(capture, live, read) == (sums[0] if sums else math.inf)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {},
            "pays       from 6 epochs x students on (docs/scale.md): a live teacher takes about 7.50 GPU hours an epoch, reading "
            "the store 0.25 hours of a loader",
        ),
        ({"read_seconds": 26_000.0}, "pays       from 145 epochs x students on"),
        ({"read_seconds": 27_001.0}, "pays       never in time, since reading takes longer than a live teacher"),
        (
            {"live_seconds": "its weights are quantised"},
            "pays       not known, since a live teacher could not be timed: its weights are quantised",
        ),
    ],
)
def test_when_a_store_pays_is_told(options, monkeypatch, capsys, changed, said):
    """The capture takes 36,000 seconds of four devices; a live teacher was timed on one."""
    monkeypatch.setattr("switchkd.pipelines.capture.dry_run.plan", lambda _: plan_of(**changed))
    _print_plan(options, egress_price=0.05)
    assert said in capsys.readouterr().out


def test_the_probe_times_a_live_teacher_and_the_store_apart(options, monkeypatch):
    """With a teacher and a reader that each wait a known time, the estimate has those times, over all 60 samples."""

    def slow(self, indices):
        time.sleep(0.005 * len(indices))
        return read(self, indices)

    def slower(self, samples):
        time.sleep(0.02 * len(samples))
        return run(self, samples)

    read, run = TeacherStore.payload, TransformersBackend.run_only
    monkeypatch.setattr(TeacherStore, "payload", slow)
    monkeypatch.setattr(TransformersBackend, "run_only", slower)
    found = plan(options)
    assert found.read_seconds >= 60 * 0.005 and found.live_seconds >= 59 * 0.02
    assert found.paying_passes == paying_passes(found.seconds, found.live_seconds, found.read_seconds)


@pytest.fixture
def vllm_is_transformers(monkeypatch):
    """Captures "with vLLM" run the transformers backend."""
    monkeypatch.setattr("switchkd.pipelines.capture.dry_run.check_available", lambda *_: None)
    monkeypatch.setattr("switchkd.pipelines.capture.manifest.software_of", lambda backend: {"backend": backend})
    monkeypatch.setattr(
        "switchkd.pipelines.capture.worker.open_backend",
        lambda name, checkpoint, dtype, **_: TransformersBackend(checkpoint, "cpu", dtype),
    )


def test_with_vllm_a_live_teacher_is_timed_in_transformers(options, vllm_is_transformers, monkeypatch):
    """20 of the 59 usable samples are run; the time is that of all 60, as the others' share is."""

    def seconds(checkpoint, dtype, samples, batch_size):
        assert (checkpoint.path, dtype, batch_size) == (options.teacher, "float32", 16)
        assert [len(sample.input_ids) for sample in samples] == sorted(len(sample.input_ids) for sample in samples)
        return 0.5 * sum(len(sample.input_ids) for sample in samples)

    encoded = []
    encode = dry_run._encode
    monkeypatch.setattr(dry_run, "_encode", lambda *found: encoded.append(encode(*found)) or encoded[-1])
    monkeypatch.setattr(dry_run, "seconds_with_transformers", seconds)
    monkeypatch.setattr(dry_run, "PROBE_SAMPLES", 20)
    found = plan(replace(options, backend="vllm", batch_size=30, check=0))
    tokens = sum(len(sample.input_ids) for _, sample in encoded[0][1])
    assert len(encoded[0][1]) == 59 and found.live_seconds == pytest.approx(0.5 * tokens)
    assert found.paying_passes == paying_passes(found.seconds, found.live_seconds, found.read_seconds)


@pytest.mark.parametrize("error", (RuntimeError("out of memory"), CheckpointError("no such weights")))
def test_what_fails_in_the_timing_of_a_live_teacher_ends_no_dry_run(options, vllm_is_transformers, monkeypatch, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(dry_run, "seconds_with_transformers", failing)
    found = plan(replace(options, backend="vllm", batch_size=30, check=0))
    assert str(error) in found.live_seconds and found.paying_passes is None


def test_of_a_mixture_a_live_teacher_is_timed_once(teacher, tmp_path, vllm_is_transformers, monkeypatch):
    """Before the engine has taken the device's memory; the time a token then serves every entry."""
    timed = []
    monkeypatch.setattr(
        dry_run, "seconds_with_transformers", lambda _, __, samples, ___: timed.append(len(samples)) or 0.5
    )
    mixture = mixtures.cut(tmp_path)
    options = mixtures.cache_options(teacher, tmp_path, backend="vllm", check=0)
    found = plan_mixture(read_mixture(mixture), options)
    assert len(timed) == 1
    assert [one.live_seconds > 0 for one in found.values()] == [True, True]
    assert found["a"].live_a_token == found["b"].live_a_token


def test_with_vllm_it_is_told_why_a_live_teacher_is_not_timed(options, vllm_is_transformers, monkeypatch, capsys):
    def left_out(*_):
        raise LeftOut("its weights are quantised, and transformers would run others")

    monkeypatch.setattr(dry_run, "seconds_with_transformers", left_out)
    options = replace(options, backend="vllm", batch_size=30, check=0)
    found = plan(options)
    assert found.paying_passes is None
    _print_plan(options, 0.0, found)
    assert "could not be timed: its weights are quantised, and transformers would run others" in capsys.readouterr().out


def test_a_mistake_is_found_by_the_dry_run(options):
    options.data.unlink()
    with pytest.raises(DataError, match="no data file"):
        plan(options)


def test_the_command_tells_all_of_it_and_writes_nothing(options):
    words = ["cache-teacher", "--teacher", options.teacher, "--data", options.data, "--images", options.images]
    done = CliRunner().invoke(main, [*map(str, words), "--out", str(options.out), "--template", "qa", "--dry-run"])
    assert done.exit_code == 0, done.output
    for text in (
        "60, about 59 usable",
        "positions  about",
        "bytes a position",
        "free disk",
        "pays       ",
        "samples/s",
        "nothing was written",
    ):
        assert text in done.stdout
    assert not options.out.exists()
