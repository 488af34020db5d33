"""Rows 12 and 24 and the fault harness: every file system call of writing, reading, verifying and repairing may fail.

Judgement: the right data or a clear error; no sound part is called damaged or removed; after one undisturbed rerun the store is
the undisturbed one, byte for byte. The fast tests take some of the calls, `make test-faults` every call: of
reading with every error, of writing and repairing, which take longer, with two of the errors in turn.
"""

import errno
import shutil
from contextlib import suppress
from itertools import chain, cycle

import pytest
import synthetic
from io_faults import READ_ERRORS, WRITE_ERRORS, Faults, count

from switchkd.errors import RunError, StoreError, StoreUnreadable
from switchkd.stores import TeacherStore
from switchkd.stores.info import describe
from switchkd.stores.status import status
from switchkd.stores.storage.paths import WRITING, part_path
from switchkd.stores.verify import repair, verify

MANIFEST = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8, samples=6, part_size=2)
LENGTHS = (0, 1, 3, 40)
FULL = pytest.param(1, id="all", marks=pytest.mark.faults)


def strides(fast):
    return pytest.mark.parametrize("stride", (pytest.param(fast, id="some"), FULL))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("undisturbed") / "s.zarr", MANIFEST, lengths=LENGTHS)


def samples_of(path):
    store = TeacherStore(path)
    found = [store[index] for index in range(len(store))]
    return [(s.status, s.digest, *(a.tobytes() for a in s.payload.arrays().values())) for s in found]


def files_of(path):
    """Contents but for unfinished folders, which this process, still alive, leaves to a later writer."""
    return synthetic.without_writer(
        {name: data for name, data in synthetic.contents(path).items() if not name.startswith(WRITING)}
    )


def plans(total, stride, errors):
    """(n, error, lasting) of every case: with stride 1 at every call, else at some; see the head of this file."""
    kinds = [*((error, False) for error in (*errors, MemoryError)), (errno.EIO, True), (MemoryError, True)]
    if stride == 1 and errors is READ_ERRORS:
        return [(n, *kind) for n in range(1, total + 1) for kind in kinds]
    turns = cycle(kinds)
    if stride == 1:
        return [(n, *next(turns)) for n in range(1, total + 1) for _ in range(2)]
    return [(n, *next(turns)) for n in chain(range(1, 8), range(8, total + 1, stride))]


@strides(17)
def test_writing(tmp_path, undisturbed, stride):
    expected = files_of(undisturbed)
    path = tmp_path / "s.zarr"
    total = count(tmp_path, lambda: synthetic.fill(path, MANIFEST, lengths=LENGTHS))
    failed = 0
    for n, error, lasting in plans(total, stride, WRITE_ERRORS):
        shutil.rmtree(path, ignore_errors=True)
        told = ""
        with Faults(tmp_path, n, error, lasting).active():
            try:
                synthetic.fill(path, MANIFEST, lengths=LENGTHS)
            except (RunError, StoreError) as error_told:
                failed += 1
                told = str(error_told)
        assert "delete" not in told, (n, error, told)
        if path.exists():
            for name, data in files_of(path).items():
                assert expected[name] == data, (n, error, name)
        synthetic.fill(path, MANIFEST, lengths=LENGTHS)
        assert files_of(path) == expected, (n, error, lasting)
    assert failed > 20


@strides(3)
@pytest.mark.parametrize("act", (samples_of, describe, status), ids=lambda act: act.__name__)
def test_reading(undisturbed, act, stride):
    expected = act(undisturbed)
    total = count(undisturbed, lambda: act(undisturbed))
    failed = 0
    for n, error, lasting in plans(total, stride, READ_ERRORS):
        with Faults(undisturbed, n, error, lasting).active():
            try:
                assert act(undisturbed) == expected, (n, error)
                continue
            except StoreUnreadable as error_told:
                failed += 1
                told = str(error_told)
        assert "could not be read" in told and "run the same command again" in told
    assert failed > 5
    assert act(undisturbed) == expected


@strides(3)
def test_a_reader_goes_on_after_a_failure(undisturbed, stride):
    """The store object that failed once, as in a training run that catches the error, reads the right data afterwards."""
    expected = samples_of(undisturbed)

    def read(store):
        samples = [store[index] for index in range(len(store))]
        return [(s.status, s.digest, *(a.tobytes() for a in s.payload.arrays().values())) for s in samples]

    total = count(undisturbed, lambda: read(TeacherStore(undisturbed)))
    for n, error, _ in plans(total, stride, READ_ERRORS):
        store = TeacherStore(undisturbed)
        with Faults(undisturbed, n, error).active(), suppress(StoreUnreadable):
            read(store)
        assert read(store) == expected


@strides(3)
def test_verifying_calls_no_sound_part_bad(undisturbed, stride):
    total = count(undisturbed, lambda: list(verify(TeacherStore(undisturbed))))
    for n, error, lasting in plans(total, stride, READ_ERRORS):
        with Faults(undisturbed, n, error, lasting).active():
            try:
                found = [finding for _, findings in verify(TeacherStore(undisturbed)) for finding in findings]
            except StoreUnreadable:
                continue
        assert all(finding.unreadable and "could not be read" in finding.message for finding in found), (
            n,
            error,
            found,
        )


@strides(120)
def test_repairing_removes_no_sound_part(tmp_path, undisturbed, stride):
    expected = files_of(undisturbed)
    path = tmp_path / "s.zarr"

    def damaged():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(undisturbed, path)
        file = part_path(path, 1) / "stats/c/0/0"
        file.write_bytes(file.read_bytes()[::-1])

    damaged()
    total = count(path, lambda: repair(TeacherStore(path)))
    for n, error, lasting in plans(total, stride, WRITE_ERRORS):
        damaged()
        with Faults(path, n, error, lasting).active():
            try:
                dropped = repair(TeacherStore(path)).dropped
            except RunError:
                dropped = []
        assert dropped in ([], [1])
        for name, data in files_of(path).items():
            assert "parts/00001" in name or expected[name] == data
        assert [part for part in (0, 2) if not (part_path(path, part) / "zarr.json").exists()] == []
        left = part_path(path, 1).exists()
        assert not (left and dropped)
        assert repair(TeacherStore(path)).dropped == ([1] if left else [])
        synthetic.fill(path, MANIFEST, lengths=LENGTHS)
        assert files_of(path) == expected, (n, error)
