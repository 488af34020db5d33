"""`store status`: parts done and missing, by whom, rate and time left, from the store alone."""

import json
from datetime import UTC, datetime, timedelta

import pytest
import synthetic
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import StoreError
from switchkd.stores.layout import PART_KEY
from switchkd.stores.status import status
from switchkd.stores.storage.paths import part_path, writer_prefix

MANIFEST = synthetic.manifest(samples=38, part_size=4)  # 10 parts, the last of 2 samples
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def written(path, part, by, seconds):
    """Rewrite who committed a part, and when after noon."""
    file = part_path(path, part) / "zarr.json"
    content = json.loads(file.read_text())
    at = (NOON + timedelta(seconds=seconds)).isoformat(timespec="seconds")
    content["attributes"][PART_KEY]["written"] = {"by": by, "at": at}
    file.write_text(json.dumps(content))


@pytest.fixture
def store(tmp_path):
    """Parts 0, 2, 4, 6, 8 and 1, of two writers; a long pause before the last four."""
    path = synthetic.fill(tmp_path / "s.zarr", MANIFEST, shard=(0, 2))
    synthetic.open_writer(path, MANIFEST).write_part(1, synthetic.part_arrays(MANIFEST, 1))
    times = {0: ("a-1", 0), 2: ("a-1", 20), 4: ("a-1", 5000), 6: ("b-7", 5010), 1: ("a-1", 5020), 8: ("b-7", 5024)}
    for part, (by, seconds) in times.items():
        written(path, part, by, seconds)
    return path


def test_who_did_what_and_how_fast(store):
    found = status(store)
    assert found.done == [0, 1, 2, 4, 6, 8]
    assert found.missing == [3, 5, 7, 9]
    assert found.samples == 24
    assert found.positions == sum(synthetic.part_arrays(MANIFEST, part).positions.sum() for part in found.done)
    assert [(w.name, w.parts, w.samples) for w in found.writers] == [("a-1", 4, 16), ("b-7", 2, 8)]
    assert found.last == NOON + timedelta(seconds=5024)
    # After the pause: 12 samples in the 24 seconds that follow the first commit; 14 samples are left.
    assert found.stretch_parts == 4
    assert found.samples_per_second == pytest.approx(12 / 24)
    assert found.seconds_left == pytest.approx(28)


def test_a_store_that_was_just_begun(tmp_path):
    path = tmp_path / "s.zarr"
    writer = synthetic.open_writer(path, MANIFEST)
    assert status(path).samples_per_second is None
    writer.write_part(3, synthetic.part_arrays(MANIFEST, 3))
    found = status(path)
    assert (found.done, found.seconds_left) == ([3], None)
    (only,) = found.writers
    assert only.name == writer_prefix()
    assert abs((datetime.now(UTC) - only.last).total_seconds()) < 60


def test_the_command_prints_it(store):
    result = CliRunner().invoke(main, ["store", "status", str(store)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "6 of 10 done; missing: 3, 5, 7, 9" in lines[1]
    assert any(line.split()[:3] == ["a-1", "4", "parts,"] for line in lines)
    assert "0.5 samples/s" in result.stdout
    assert "28 seconds" in result.stdout


def test_a_whole_store_is_done(tmp_path):
    path = synthetic.fill(tmp_path / "s.zarr", MANIFEST)
    result = CliRunner().invoke(main, ["store", "status", str(path)])
    assert "10 of 10 done; missing: none" in result.stdout


def test_a_part_that_does_not_say_who_wrote_it(store):
    file = part_path(store, 2) / "zarr.json"
    file.write_text(file.read_text().replace('"written"', '"witten"'))
    with pytest.raises(StoreError, match=r"parts/00002/zarr\.json does not say who wrote the part"):
        status(store)
