"""`cache-teacher --dry-run`: estimates from a probe, and nothing written."""

import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import DataError
from switchkd.pipelines.cache_teacher import CacheOptions, cache_teacher
from switchkd.pipelines.dry_run import plan
from switchkd.stores.info import describe


@pytest.fixture
def options(teacher, tmp_path):
    rows = tiny.rows(60, text_only=(3,), two_turns=range(0, 60, 3))
    data = tiny.data(tmp_path / "data", rows)
    (data.parent / "images/007.png").write_bytes(b"x")
    return CacheOptions(teacher, data, tmp_path / "s.zarr", data.parent / "images", template="qa", part_size=60)


@pytest.mark.parametrize("payload", ("topk", "hidden"))
def test_the_plan_is_what_the_capture_then_takes(options, payload):
    from dataclasses import replace

    options = replace(options, payload=payload)
    found = plan(options)  # 60 samples: the probe sees all of them
    assert not options.out.exists()
    cache_teacher(options)
    made = describe(options.out)
    assert (found.samples, found.usable_samples, found.positions) == (60, made.samples, made.positions)
    assert found.bytes_per_position == pytest.approx(made.bytes_per_position, rel=0.02)
    assert found.seconds > 0 and found.free_bytes > 0


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
