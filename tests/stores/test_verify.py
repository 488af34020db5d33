"""`store verify` and `store repair`: what is wrong is named, dropped, and written again by the same command."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import synthetic
import zarr
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import StoreError
from switchkd.stores import StoreWriter, TeacherStore
from switchkd.stores.layout import GAP, MEAN, STAT_COLUMNS, STEP
from switchkd.stores.payload import Payload
from switchkd.stores.storage.paths import part_path
from switchkd.stores.verify import _payload_problems, missing_parts, repair, verify

BOTH = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8)
STEPS = synthetic.tables(BOTH).hidden_steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("whole") / "s.zarr", BOTH)


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s.zarr")


def bad_parts(path):
    return [part for part, findings in verify(TeacherStore(path)) if findings]


def flip(file, bit=77):
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(bytes(data))


def test_a_whole_store_is_good(path):
    assert bad_parts(path) == []
    assert missing_parts(TeacherStore(path)) == []


def files_of(whole, part):
    return sorted(str(f.relative_to(part_path(whole, part))) for f in part_path(whole, part).rglob("*") if f.is_file())


def test_a_flipped_bit_in_any_file_of_a_part_is_found(whole, path):
    for name in files_of(whole, 2):
        file = part_path(path, 2) / name
        kept = file.read_bytes()
        flip(file)
        assert bad_parts(path) == [2], name
        file.write_bytes(kept)
    assert bad_parts(path) == []


def test_a_deleted_file_and_an_added_one_are_found(path):
    (part_path(path, 1) / GAP / "c/0/0").unlink()
    (part_path(path, 3) / "notes.txt").write_text("mine")
    found = {part: findings for part, findings in verify(TeacherStore(path)) if findings}
    assert "should have" in found[1][0].message
    assert "notes.txt does not belong to the part" in found[3][0].message


@pytest.mark.parametrize("more", (7, -1, 5000))
def test_offsets_that_disagree_with_the_arrays_are_found(path, more):
    shutil.rmtree(part_path(path, 2))
    arrays = synthetic.part_arrays(BOTH, 2)
    positions = arrays.positions.copy()
    positions[np.flatnonzero(positions)[-1]] += more
    synthetic.open_writer(path, BOTH).write_part(2, replace(arrays, positions=positions))
    found = {part: findings for part, findings in verify(TeacherStore(path)) if findings}
    assert list(found) == [2]
    count = len(arrays.payload)
    assert f"stats has {count} positions, its samples have {count + more}; it was damaged" in found[2][0].message
    assert repair(TeacherStore(path)).dropped == [2]


def good_payload():
    return synthetic.part_arrays(BOTH, 0, lengths=(3,)).payload


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stats", {"z_max": np.nan}, "a statistic is not finite"),
        ("stats", {"logsumexp": -50}, "logsumexp lies below z_max"),
        ("stats", {"z_min": 90}, "z_min lies above z_max"),
        ("stats", {"tail_logsumexp": 90}, "tail_logsumexp lies above logsumexp"),
        ("stats", {"knee": 1}, r"the knee lies outside 2 … N \(1 of"),
        ("stats", {"knee": 51}, "the knee lies outside"),
        ("ids", 7, "an id occurs twice in a position"),
        ("ids", 50, "an id lies outside the vocabulary"),
        ("logits", -90, "the k-th logit lies below z_min"),
        ("hidden", np.inf, "a hidden state is not finite"),
        ("hidden", 1e6, "a hidden state lies too many steps from the mean"),
    ],
)
def test_values_that_contradict_each_other_are_named(name, change, message):
    arrays = {key: array.copy() for key, array in good_payload().arrays().items()}
    if isinstance(change, dict):
        for column, value in change.items():
            arrays[name][1, STAT_COLUMNS.index(column)] = value
    else:
        arrays[name][1, -2:] = change
    problems = list(_payload_problems(Payload(**arrays), BOTH, STEPS))
    assert any(re.search(message, problem) for problem in problems), problems
    assert list(_payload_problems(good_payload(), BOTH, STEPS)) == []


def swap_tables(path, of=BOTH):
    """Give a store the step of another capture of the same identity."""
    steps = synthetic.tables(of).hidden_steps
    tables = replace(synthetic.tables(of), hidden_steps=replace(steps, step=steps.step * 2))
    other = StoreWriter(path.with_name("other.zarr"), of, lambda: tables).path
    shutil.rmtree(path / STEP)
    shutil.copytree(other / STEP, path / STEP)


def test_a_part_that_was_encoded_with_other_tables_is_found_and_dropped(path):
    """A part of another capture with the same identity, copied into the store, would decode to wrong numbers."""
    stray = shutil.copytree(path, path.with_name("stray.zarr"))
    swap_tables(stray)
    for folder in (stray / "parts").iterdir():
        shutil.rmtree(folder) if folder.is_dir() else None
    synthetic.fill(stray, BOTH)
    shutil.rmtree(part_path(path, 1))
    shutil.copytree(part_path(stray, 1), part_path(path, 1))
    index = BOTH.part_size
    with pytest.raises(
        StoreError, match=r"was encoded with other tables than the store's \(vocab/id_of_rank, hidden/step"
    ):
        TeacherStore(path)[index]
    assert bad_parts(path) == [1]
    assert repair(TeacherStore(path)).dropped == [1]
    synthetic.fill(path, BOTH)
    assert bad_parts(path) == []


def test_repair_removes_nothing_if_the_tables_are_what_is_wrong(path):
    before = synthetic.contents(path / "parts")
    swap_tables(path)
    with pytest.raises(StoreError, match="these are not what was written; restore them. Nothing was removed"):
        repair(TeacherStore(path))
    assert synthetic.contents(path / "parts") == before


@pytest.mark.parametrize("name", (STEP, MEAN))
@pytest.mark.parametrize("how", ("deleted", "flipped", "no folder"))
def test_a_damaged_table_is_named(path, name, how):
    if how == "flipped":
        flip(path / name / "c/0", 500)
    elif how == "deleted":
        (path / name / "c/0").unlink()  # zarr reads the fill value without an error
    else:
        shutil.rmtree(path / name)
    with pytest.raises(StoreError, match=f"{name}.* it was damaged after writing: restore it"):
        TeacherStore(path)


@pytest.mark.parametrize("values", (np.ones(7), [1.0] * 7 + [0.0], [1.0] * 7 + [-1.0], [1.0] * 7 + [np.inf]))
def test_a_table_of_other_values_is_refused(path, values):
    values = np.array(values, np.float32)
    zarr.open_group(path).create_array(STEP, data=values, chunks=values.shape, overwrite=True)
    with pytest.raises(StoreError, match="hidden/step: not 8 finite float32 numbers above 0"):
        TeacherStore(path)


def test_repair_drops_the_bad_parts_and_the_next_run_writes_exactly_these(whole, path):
    flip(part_path(path, 2) / GAP / "c/0/0")
    flip(part_path(path, 4) / "stats/zarr.json")
    kept = {part: part_path(path, part).stat().st_ino for part in (0, 1, 3)}
    assert repair(TeacherStore(path)).dropped == [2, 4]
    assert missing_parts(TeacherStore(path)) == [2, 4]
    synthetic.fill(path, BOTH)
    synthetic.assert_same_store(path, whole)
    assert {part: part_path(path, part).stat().st_ino for part in kept} == kept


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_commands_say_what_is_bad_and_what_to_do(path):
    good = run("store", "verify", path)
    assert good.exit_code == 0, good.output
    assert "5 parts good, 0 bad, 0 missing" in good.output
    shutil.rmtree(part_path(path, 0))
    flip(part_path(path, 2) / GAP / "c/0/0")
    bad = run("store", "verify", path)
    assert bad.exit_code == 1
    assert "part 2: " in bad.output
    assert "missing: 1 part, the first is 0; run cache-teacher again" in bad.output
    assert "3 parts good, 1 bad, 1 missing" in bad.output
    assert "dropped parts: 2; run cache-teacher again" in run("store", "repair", path).output
    assert "dropped parts: none" in run("store", "repair", path).output


def test_the_plot_is_a_picture(path, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra viz")
    from PIL import Image

    done = run("store", "plot", path, "--out", tmp_path / "s.png")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 1000
