"""Killed, competing and hindered writers lose nothing and end in the undisturbed store; damage is found on reading."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic

from switchkd.counting import counted
from switchkd.errors import RunError, StoreError, StoreMismatch
from switchkd.stores import StoreTables, TeacherStore
from switchkd.stores.layout import BOTTOM, DIGEST, GAP, HEIGHT, ID_OF_RANK, OFFSET, PART_KEY, STATS, STATUS
from switchkd.stores.storage import staging
from switchkd.stores.storage.paths import WRITING, part_path

MANIFEST = synthetic.manifest()
SMALL_DISK = 1 << 20
DAMAGED_PART_ADVICE = "delete its part's folder and run the same `switchkd cache-teacher` command again"
spawn = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What one writer makes without any fault; no test writes to it."""
    return synthetic.fill(tmp_path_factory.mktemp("undisturbed") / "s.zarr", MANIFEST)


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A copy of the undisturbed store, to be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "s.zarr")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of SMALL_DISK bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def unfinished(path):
    return sorted(entry.name for entry in (path / WRITING).iterdir())


def read_all(path):
    store = TeacherStore(path)
    samples = [store[index] for index in range(len(store))]
    arrays = [
        (s.status, s.digest, *(a.tobytes() for a in (s.payload.ids, s.payload.logits, s.payload.stats)))
        for s in samples
    ]
    return store.manifest, arrays, [store.part_positions(part) for part in store.parts()]


def samples_or_error(path):
    try:
        return read_all(path)
    except StoreError as error:
        return str(error)


def run_processes(path, calls):
    """Fill a store by several processes at once, one for each of `calls`; return their exit codes."""
    processes = [spawn.Process(target=synthetic.fill, args=(path,), kwargs={"of": MANIFEST} | call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def chunk_file(path, array, part=3):
    """The one chunk file of an array; part 3 has every array's, as it holds a bad sample."""
    (found,) = [file for file in (part_path(path, part) / array / "c").rglob("*") if file.is_file()]
    return found


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def some_bits(file, count):
    """The first and the last bit of a file, and some between."""
    bits = 8 * file.stat().st_size
    return [0, bits - 1, *random.Random(0).sample(range(bits), count)]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


# Resuming


def test_the_undisturbed_store_leaves_nothing_behind(undisturbed):
    assert unfinished(undisturbed) == []
    assert [entry.name for entry in undisturbed.parent.iterdir()] == ["s.zarr"]


def test_missing_parts_only_are_written(copied, undisturbed):
    for part in (1, 4):
        shutil.rmtree(part_path(copied, part))
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.is_file()}
    writer = synthetic.open_writer(copied, MANIFEST)
    assert writer.missing_parts() == [1, 4]
    assert [writer.has_part(part) for part in range(5)] == [True, False, True, True, False]
    for part in writer.missing_parts():
        assert writer.write_part(part, synthetic.part_arrays(MANIFEST, part))
    assert writer.missing_parts() == []
    synthetic.assert_same_store(copied, undisturbed)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_whole_store_needs_no_rank_table(copied):
    writer = synthetic.StoreWriter(copied, MANIFEST, lambda: pytest.fail("the table was there"))
    assert writer.missing_parts() == []


@pytest.mark.parametrize("shards", (1, 2, 3, 7))
def test_shards_take_every_part_once(tmp_path, shards):
    writer = synthetic.open_writer(tmp_path / "s.zarr", MANIFEST)
    taken = [writer.missing_parts((index, shards)) for index in range(shards)]
    assert sorted(part for parts in taken for part in parts) == [0, 1, 2, 3, 4]


def test_another_number_of_workers_finishes_the_store(tmp_path, undisturbed):
    path = synthetic.fill(tmp_path / "s.zarr", MANIFEST, shard=(1, 3))
    synthetic.fill(path, MANIFEST, shard=(0, 2))
    synthetic.fill(path, MANIFEST, shard=(1, 2))
    synthetic.assert_same_store(path, undisturbed)


def test_the_second_writer_of_a_part_drops_its_own(copied, undisturbed):
    writer = synthetic.open_writer(copied, MANIFEST)
    other = synthetic.part_arrays(MANIFEST, 2)
    assert writer.write_part(2, replace(other, digest=other.digest + np.uint64(1))) is False
    synthetic.assert_same_store(copied, undisturbed)
    assert unfinished(copied) == []


def test_the_second_creator_takes_the_first_ones_table(tmp_path):
    path = tmp_path / "s.zarr"

    def overtaken():
        synthetic.open_writer(path, MANIFEST)
        return StoreTables(np.arange(MANIFEST.vocab_rows, dtype=np.uint32))

    synthetic.StoreWriter(path, MANIFEST, overtaken)
    assert np.array_equal(TeacherStore(path).id_of_rank, synthetic.id_of_rank(MANIFEST.vocab_rows))
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.zarr"]


def test_a_part_of_another_store_is_refused(copied, tmp_path):
    """Same number, same samples, another teacher."""
    other = synthetic.fill(tmp_path / "other.zarr", synthetic.manifest(tokenizer="t1"))
    shutil.rmtree(part_path(copied, 2))
    shutil.copytree(part_path(other, 2), part_path(copied, 2))
    with pytest.raises(StoreError, match="was written for another store"):
        TeacherStore(copied)[8]


def test_arrays_that_cannot_be_packed_leave_nothing(copied):
    shutil.rmtree(part_path(copied, 2))
    writer = synthetic.open_writer(copied, MANIFEST)
    arrays = synthetic.part_arrays(MANIFEST, 2)
    with pytest.raises(RunError, match="part 2 cannot be stored: only finite logits can be stored"):
        writer.write_part(
            2, replace(arrays, payload=replace(arrays.payload, logits=arrays.payload.logits * np.float32(np.nan)))
        )
    assert writer.missing_parts() == [2]
    assert unfinished(copied) == []


# Other settings


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"payload": "hidden"}, "payload: store 'topk', here 'hidden'"),
        ({"top_k": 8}, "k: store 6, here 8"),
        ({"coarse": 0.5}, "coarsest step: store 0.0625, here 0.5"),
        ({"vocab_rows": 51}, "vocabulary rows: store 50, here 51"),
        ({"samples": 19}, "number of samples: store 18, here 19"),
        ({"part_size": 5}, "part size: store 4, here 5"),
        ({"teacher": MANIFEST.teacher | {"dtype": "bfloat16"}}, "teacher dtype: store 'float32', here 'bfloat16'"),
        ({"teacher": MANIFEST.teacher | {"vision": "v1"}}, "teacher vision: store 'v0', here 'v1'"),
        ({"tokenizer": "t1"}, "tokenizer: store 't0', here 't1'"),
        ({"template": {"name": "qa", "system": "Hi"}}, "template system: store '', here 'Hi'"),
        ({"image_processor": "i1"}, "image processor: store 'i0', here 'i1'"),
        ({"image_tokens": 9}, "tokens per image: store 4, here 9"),
        ({"max_length": 65}, "maximum length: store 1024, here 65"),
        ({"max_image_pixels": 9}, "maximum image pixels: store 1000, here 9"),
        ({"data": "d1"}, "data file: store 'd0', here 'd1'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(":")[0].replace(" ", "_"),
)
def test_other_settings_are_refused_by_name(undisturbed, changed, line):
    with pytest.raises(StoreMismatch) as caught:
        synthetic.open_writer(undisturbed, replace(MANIFEST, **changed))
    assert str(caught.value).splitlines() == [
        f"{undisturbed} was begun with other settings:",
        f"  {line}",
        "Use the settings it was begun with, or another --out",
    ]


def test_every_other_setting_is_named(undisturbed):
    changed = replace(MANIFEST, top_k=8, tokenizer="t1", teacher=MANIFEST.teacher | {"config": "c1", "language": "l1"})
    with pytest.raises(StoreMismatch) as caught:
        synthetic.open_writer(undisturbed, changed)
    words = [line.split(":")[0] for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert words == ["  k", "  teacher config", "  teacher language", "  tokenizer"]


def test_other_software_may_go_on(copied, undisturbed):
    shutil.rmtree(part_path(copied, 0))
    synthetic.fill(copied, replace(MANIFEST, written_by={"backend": "newer"}))
    synthetic.assert_same_store(copied, undisturbed)


@pytest.mark.parametrize("kind", ("file", "folder"))
def test_something_else_at_the_path_is_left_alone(tmp_path, kind):
    path = tmp_path / "s.zarr"
    kept = path if kind == "file" else path / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    with pytest.raises(StoreError, match=r"s\.zarr is not a teacher store"):
        synthetic.open_writer(path, MANIFEST)
    assert kept.read_text() == "kept"


# Several writers, killed writers


@pytest.mark.parametrize("shards", [[(i, 4) for i in range(4)], [(0, 1)] * 4], ids=("own parts", "the same parts"))
def test_four_processes_fill_one_store_at_once(tmp_path, undisturbed, shards):
    barrier = spawn.Barrier(4)
    path = tmp_path / "s.zarr"
    assert run_processes(path, [{"shard": shard, "barrier": barrier} for shard in shards]) == [0] * 4
    synthetic.assert_same_store(path, undisturbed)
    assert unfinished(path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.zarr"]


def test_writers_killed_at_random_instants_end_in_the_undisturbed_store(tmp_path, undisturbed):
    """Each round kills its writers at a random file system act (creation takes some 45, a part 125); others go on."""
    path = tmp_path / "s.zarr"
    instants = random.Random(3)
    exits = []
    for workers in (1, 1, 2, 1, 2):
        calls = [{"shard": (index, workers), "die_at": instants.randint(1, 150)} for index in range(workers)]
        exits += run_processes(path, calls)
        if path.exists():
            read_what_is_there(path)
    assert exits.count(-signal.SIGKILL) >= 6
    assert 0 < len(synthetic.open_writer(path, MANIFEST).missing_parts()) < MANIFEST.part_count
    assert unfinished(path) == []
    synthetic.fill(path, MANIFEST)
    synthetic.assert_same_store(path, undisturbed)


@pytest.mark.parametrize("least", [8, pytest.param(50, marks=pytest.mark.faults)])
def test_many_kills_lose_nothing(tmp_path, least):
    """The same command again and again, each time killed at another instant, now and then with two or three workers."""
    of = synthetic.manifest(samples=40, part_size=1)
    lengths = (0, 1, 3, 40)
    undisturbed = synthetic.fill(tmp_path / "u.zarr", of, lengths=lengths)
    path = tmp_path / "s.zarr"
    instants = random.Random(5)
    kills = rounds = 0
    while kills < least:
        workers = instants.choice((1, 1, 1, 2, 3))
        calls = [
            {"of": of, "shard": (index, workers), "die_at": instants.randint(1, 120), "lengths": lengths}
            for index in range(workers)
        ]
        kills += run_processes(path, calls).count(-signal.SIGKILL)
        rounds += 1
        if path.exists():
            read_what_is_there(path, of, lengths)
        assert rounds < 100, "the store was whole before it was killed often enough"
    synthetic.fill(path, of, lengths=lengths)
    synthetic.assert_same_store(path, undisturbed)
    assert unfinished(path) == []


def read_what_is_there(path, of=MANIFEST, lengths=synthetic.LENGTHS):
    store = TeacherStore(path)
    for part in store.parts():
        assert store.part_positions(part) == synthetic.part_arrays(of, part, lengths).positions.sum()


INTERRUPT = """
import os, signal, sys, synthetic
encode = synthetic.StoreWriter._part_files
def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return encode(*arguments)
synthetic.StoreWriter._part_files = interrupted
synthetic.fill(synthetic.Path(sys.argv[1]), synthetic.manifest())
"""


def test_an_interruption_lets_the_part_in_hand_finish(tmp_path, undisturbed):
    """Else zarr's threads would tell of their failures after the last line of the run."""
    path = tmp_path / "s.zarr"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    done = subprocess.run([sys.executable, "-c", INTERRUPT, path], env=environment, stderr=subprocess.PIPE, text=True)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert TeacherStore(path).parts() == [0]
    assert unfinished(path) == []
    synthetic.fill(path, MANIFEST)
    synthetic.assert_same_store(path, undisturbed)


@pytest.mark.parametrize("act", (1, 10, 20))
def test_a_killed_creation_leaves_no_store(tmp_path, undisturbed, act):
    path = tmp_path / "s.zarr"
    assert run_processes(path, [{"die_at": act}]) == [-signal.SIGKILL]
    assert not path.exists()
    synthetic.fill(path, MANIFEST)
    synthetic.assert_same_store(path, undisturbed)


def test_leftovers_of_dead_writers_of_this_machine_are_removed(copied):
    host, boot, namespace = staging.machine()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = [
        f"{host}-{boot}-{namespace}-{os.getpid()}-00001-0a",
        f"{host}-{boot}-{namespace}-1-00001-0b",
        f"other{host}-{boot}-{namespace}-{dead.pid}-00001-0c",
        f"{host}-{boot}-{namespace}0-{dead.pid}-00001-0d",  # of another container with the same host name
        f"{host}-0{boot[1:]}-{namespace}-{dead.pid}-00001-0e",  # of another machine with the same host name
        f"{host}-{dead.pid}-00001-0f",  # of a version that did not tell these apart
    ]
    for name in [*alive, f"{host}-{boot}-{namespace}-{dead.pid}-00001-0d"]:
        (copied / WRITING / name / "topk").mkdir(parents=True)
    synthetic.open_writer(copied, MANIFEST)
    assert unfinished(copied) == sorted(alive)


# Damage, found on reading


@pytest.mark.parametrize("array", (GAP, HEIGHT, BOTTOM, STATS, OFFSET, DIGEST, STATUS))
def test_a_flipped_bit_in_a_chunk_is_found(copied, array):
    file = chunk_file(copied, array)
    for bit in some_bits(file, 4):
        flip(file, bit)
        with pytest.raises(StoreError, match=rf"s\.zarr/parts/\d+/{array}(: |/c/).*{re.escape(DAMAGED_PART_ADVICE)}$"):
            read_all(copied)
        flip(file, bit)
    read_all(copied)


@pytest.mark.parametrize("array", (GAP, HEIGHT, BOTTOM, STATS, OFFSET, DIGEST, STATUS))
def test_a_file_cut_short_is_found(copied, array):
    file = chunk_file(copied, array)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    message = (
        f"{file} should have {size} bytes, found {size - 1} bytes; it was damaged after writing: {DAMAGED_PART_ADVICE}"
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        read_all(copied)


@pytest.mark.parametrize("array", (GAP, HEIGHT, BOTTOM, STATS, OFFSET, DIGEST, STATUS))
def test_a_deleted_shard_is_found(copied, array):
    file = chunk_file(copied, array)
    size = file.stat().st_size
    file.unlink()
    with pytest.raises(StoreError, match=re.escape(f"{file} should have {size} bytes, found nothing; it was damaged")):
        read_all(copied)


@pytest.mark.parametrize("array", (GAP, HEIGHT, BOTTOM, STATS, OFFSET, DIGEST, STATUS))
def test_a_flipped_bit_in_array_metadata_is_found(copied, array):
    """Checksums do not cover zarr.json, and `"fill_value": 1` or another shape would read without an error."""
    file = part_path(copied, 1) / array / "zarr.json"
    for bit in some_bits(file, 4):
        flip(file, bit)
        with pytest.raises(StoreError, match=re.escape(f"{file} is not what was written; it was damaged")):
            read_all(copied)
        flip(file, bit)


def test_a_flipped_bit_in_a_parts_own_metadata_changes_nothing_or_is_found(copied):
    expected = read_all(copied)
    file = part_path(copied, 1) / "zarr.json"
    refused = 0
    for bit in some_bits(file, 40):
        flip(file, bit)
        outcome = samples_or_error(copied)
        if outcome != expected:
            assert str(part_path(copied, 1)) in outcome
            refused += 1
        flip(file, bit)
    assert refused > 25


@pytest.mark.parametrize("key", ("part", "samples", "files"))
def test_a_part_that_does_not_say_what_it_holds_is_refused(copied, key):
    file = part_path(copied, 1) / "zarr.json"
    data = json.loads(file.read_text())
    del data["attributes"][PART_KEY][key]
    file.write_text(json.dumps(data))
    with pytest.raises(
        StoreError, match=r"00001( is not part 1|/zarr.json: does not list its files).*was damaged after writing"
    ):
        read_all(copied)


@pytest.mark.parametrize(("source", "target"), [(2, 1), (4, 1), (1, 4)])
def test_a_part_in_anothers_place_is_found(copied, source, target):
    shutil.rmtree(part_path(copied, target))
    shutil.copytree(part_path(copied, source), part_path(copied, target))
    message = (
        rf"parts/0000{target} is not part {target} of this store \({len(MANIFEST.part_samples(target))} samples\); it"
    )
    with pytest.raises(StoreError, match=message):
        read_all(copied)


@pytest.mark.parametrize("content", ("", "{}", '{"attributes": {}, "zarr_format": 3, "node_type": "group"}'))
def test_a_folder_that_is_no_part_is_refused(copied, content):
    shutil.rmtree(part_path(copied, 1))
    part_path(copied, 1).mkdir()
    (part_path(copied, 1) / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match=r"parts/00001"):
        read_all(copied)


def test_following_the_advice_mends_the_store(copied, undisturbed):
    flip(chunk_file(copied, GAP), 100)
    with pytest.raises(StoreError, match=re.escape(DAMAGED_PART_ADVICE)):
        read_all(copied)
    shutil.rmtree(part_path(copied, 3))
    synthetic.fill(copied, MANIFEST)
    synthetic.assert_same_store(copied, undisturbed)


def test_damage_in_one_part_leaves_the_others_readable(copied, undisturbed):
    flip(chunk_file(copied, GAP, part=1), 100)
    store, expected = TeacherStore(copied), TeacherStore(undisturbed)
    for index in (0, 3, 8, 17):
        assert np.array_equal(store[index].payload.ids, expected[index].payload.ids)


def test_a_deleted_rank_table_is_found(copied):
    """It would read as zeros: every id the same."""
    (copied / ID_OF_RANK / "c/0").unlink()
    message = rf"array {ID_OF_RANK}: not each of 50 ids once; .* restore it, or delete the store and cache again$"
    with pytest.raises(StoreError, match=message):
        TeacherStore(copied)
    with pytest.raises(StoreError, match=message):
        synthetic.open_writer(copied, MANIFEST)


@pytest.mark.parametrize("name", ("c/0", "zarr.json"))
def test_a_flipped_bit_in_the_rank_table_is_found(copied, name):
    expected = read_all(copied)
    file = copied / ID_OF_RANK / name
    for bit in some_bits(file, 20):
        flip(file, bit)
        outcome = samples_or_error(copied)
        if name == "c/0" or outcome != expected:  # not every bit of a zarr.json matters
            assert ID_OF_RANK in outcome
        flip(file, bit)


# Disks that refuse


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(small_disk, undisturbed):
    pages = sum(-(-len(data) // 4096) for data in synthetic.contents(undisturbed).values())
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(SMALL_DISK - 4096 * pages // 2))  # room for half of the store
    path = small_disk / "s.zarr"
    with pytest.raises(RunError, match=r"cannot write part \d of .*No space left on device") as caught:
        synthetic.fill(path, MANIFEST)
    done = len(TeacherStore(path).parts())
    assert 0 < done < MANIFEST.part_count
    assert f"What was written so far, {counted(done, 'part')}, is whole; make room or mend the folder and run" in str(
        caught.value
    )
    assert unfinished(path) == []
    read_what_is_there(path)
    ballast.unlink()
    synthetic.fill(path, MANIFEST)
    synthetic.assert_same_store(path, undisturbed)


def test_a_full_disk_at_creation_leaves_no_store(small_disk, undisturbed):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(SMALL_DISK))
    path = small_disk / "s.zarr"
    with pytest.raises(StoreError, match=r"^cannot create .*s\.zarr: .*No space left on device"):
        synthetic.fill(path, MANIFEST)
    assert [entry.name for entry in small_disk.iterdir()] == ["ballast"]
    ballast.unlink()
    synthetic.fill(path, MANIFEST)
    synthetic.assert_same_store(path, undisturbed)


def test_a_disk_that_became_read_only_is_still_read(small_disk, undisturbed):
    path = synthetic.fill(small_disk / "s.zarr", MANIFEST, shard=(0, 2))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RunError, match=r"cannot write part 1 of .*Read-only file system"):
        synthetic.fill(path, MANIFEST)
    read_what_is_there(path)
    with pytest.raises(StoreError, match=r"^cannot create .*t\.zarr: .*Read-only file system"):
        synthetic.fill(small_disk / "t.zarr", MANIFEST)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    synthetic.fill(path, MANIFEST)
    synthetic.assert_same_store(path, undisturbed)


@pytest.mark.parametrize("files", (0, 1, 5, 12))
def test_no_space_in_the_middle_of_a_part(copied, undisturbed, monkeypatch, files):
    shutil.rmtree(part_path(copied, 2))
    write, left = os.write, iter(range(files))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *arguments: no_space() if next(left, None) is None else write(*arguments))
        with pytest.raises(
            RunError, match=r"part 2 of .*No space left on device\. What was written so far, 4 parts, is whole"
        ):
            synthetic.fill(copied, MANIFEST)
    assert unfinished(copied) == []
    synthetic.fill(copied, MANIFEST)
    synthetic.assert_same_store(copied, undisturbed)


@pytest.mark.parametrize("act", ("mkdir", "rename"))
def test_a_folder_that_cannot_be_written(copied, undisturbed, monkeypatch, act):
    shutil.rmtree(part_path(copied, 2))
    with monkeypatch.context() as patch:
        patch.setattr(os, act, read_only)
        with pytest.raises(
            RunError, match=r"cannot write part 2 of .*Read-only file system\. What was written so far, 4 parts"
        ):
            synthetic.fill(copied, MANIFEST)
    assert unfinished(copied) == []
    synthetic.fill(copied, MANIFEST)
    synthetic.assert_same_store(copied, undisturbed)


@pytest.mark.parametrize("act", ("mkdir", "rename"))
def test_a_store_that_cannot_be_created(tmp_path, monkeypatch, act):
    monkeypatch.setattr(os, act, read_only)
    with pytest.raises(StoreError, match=r"^cannot create .*s\.zarr: .*Read-only file system"):
        synthetic.open_writer(tmp_path / "s.zarr", MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_sync_commits_nothing(copied, monkeypatch):
    """A part whose bytes may not be on the disk must not become visible."""
    shutil.rmtree(part_path(copied, 2))
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match="cannot write part 2"):
        synthetic.fill(copied, MANIFEST)
    assert not part_path(copied, 2).exists()
    assert unfinished(copied) == []
