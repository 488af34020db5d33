"""`cache-teacher --dry-run`: estimates from a probe, and nothing written."""

from dataclasses import replace

import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.cache_teacher import _print_plan
from switchkd.cli.main import main
from switchkd.errors import DataError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.dry_run import Plan, plan
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.stores.info import describe


@pytest.fixture
def options(teacher, tmp_path):
    rows = tiny.rows(60, text_only=(3,), two_turns=range(0, 60, 3))
    data = tiny.data(tmp_path / "data", rows)
    (data.parent / "images/007.png").write_bytes(b"x")
    return CacheOptions(teacher, data, tmp_path / "s.zarr", data.parent / "images", template="qa", part_size=60)


@pytest.mark.parametrize(
    ("payload", "dtype"),
    [("topk", "float16"), ("hidden", "float16"), ("hidden", "bfloat16"), ("hidden", "int8"), ("both", "int8")],
)
def test_the_plan_is_what_the_capture_then_takes(options, payload, dtype):
    options = replace(options, payload=payload, hidden_dtype=dtype)
    found = plan(options)  # 60 samples: the probe sees all of them
    assert not options.out.exists()
    cache_teacher(options)
    made = describe(options.out)
    assert (found.samples, found.usable_samples, found.positions) == (60, made.samples, made.positions)
    assert found.bytes_per_position == pytest.approx(made.bytes_per_position, rel=0.03)
    assert found.seconds > 0 and found.free_bytes > 0
    names = ["topk", "hidden, float16", "hidden, bfloat16", "hidden, int8"]
    assert list(found.payload_bytes)[:4] == names
    assert found.payload in found.payload_bytes
    assert found.store_bytes() == round(found.positions * found.bytes_per_position)


def plan_of(**changed):
    fields = {
        "samples": 665_298,
        "usable_samples": 664_943,
        "positions": 60_000_000,
        "payload": "topk",
        "payload_bytes": {"topk": 250.0, "hidden, int8": 2200.0},
        "free_bytes": None,
        "samples_per_second": 20.0,
        "seconds": 36_000.0,
        "devices": 4,
        "on_gpu": True,
        "probed_samples": 64,
    }
    return Plan(**(fields | changed))


def test_device_hours_and_egress_are_arithmetic(options, monkeypatch, capsys):
    """60 million positions of 250 bytes are 15 GB; ten hours on four devices are 40 GPU hours."""
    monkeypatch.setattr("switchkd.pipelines.capture.dry_run.plan", lambda _: plan_of())
    _print_plan(replace(options, out="s3://bucket/s.zarr"), egress_price=0.05)
    said = capsys.readouterr().out
    assert "about 40.00 GPU hours: 20.0 samples/s a worker of 4 devices" in said
    assert "about 15.000 GB (topk), 250 bytes a position" in said
    assert "about $0.75 to read it once from outside, at $0.05 a GB" in said
    assert "132.000 GB" in said
    _print_plan(options, egress_price=0.05)
    assert "egress" not in capsys.readouterr().out


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
        "samples/s",
        "nothing was written",
    ):
        assert text in done.stdout
    assert not options.out.exists()
