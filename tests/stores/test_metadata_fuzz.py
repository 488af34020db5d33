"""Row 21, the fault harness: mutated metadata with right checksums give the right data or StoreError, in bounded time and space."""

import copy
import json
import math
import shutil
import signal
import tracemalloc
from contextlib import contextmanager

import pytest
import resealed
import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchkd.errors import StoreError
from switchkd.stores import TeacherStore
from switchkd.stores.info import describe
from switchkd.stores.status import status
from switchkd.stores.storage.paths import part_path
from switchkd.stores.verify import verify

MANIFEST = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8, samples=4, part_size=2)
MOST_BYTES = 256 << 20
MOST_SECONDS = 10
FUZZ = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
FULL = pytest.mark.faults
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    8,
    9,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**32,
    2**40,
    2**53,
    2**63,
    2**64,
    10**15,
    10**40,
)
FLOATS = (0.5, -0.0, 1e-300, 1e300, math.inf, -math.inf, math.nan)
TEXTS = (
    "",
    "x",
    "0",
    "..",
    "../../x",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "\ud800",
    "NaN",
    "zarr.json",
    "c/0",
    "topk",
    "float64",
    "ü" * 70,
)
deep = ["x"]
for _ in range(60):
    deep = [deep]
VALUES = (
    st.sampled_from((None, True, False, *NUMBERS, *FLOATS, *TEXTS, [], {}, [1], [0, 0], {"a": 1}, deep)) | st.integers()
)


def paths_in(data, prefix=()):
    """Every place in JSON data."""
    yield prefix
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths_in(value, (*prefix, key))


def node(data, path):
    for key in path:
        data = data[key]
    return data


@st.composite
def mutated(draw, data):
    """JSON data with one to three places replaced, removed, added, or copied from another place."""
    data = {"root": copy.deepcopy(data)}
    for _ in range(draw(st.integers(1, 3))):
        *parent, key = draw(st.sampled_from(list(paths_in(data))[1:]))
        holder = node(data, parent)
        match draw(st.sampled_from(("replace", "replace", "remove", "copy", "add", "scale"))):
            case "replace":
                holder[key] = copy.deepcopy(draw(VALUES))
            case "remove" if parent:
                del holder[key]
            case "copy":
                source = draw(st.sampled_from(list(paths_in(data["root"]))))
                holder[key] = copy.deepcopy(node(data["root"], source))
            case "add" if isinstance(holder[key], list):
                holder[key].append(copy.deepcopy(draw(VALUES)))
            case "add" if isinstance(holder[key], dict):
                holder[key][draw(st.sampled_from(TEXTS[:-1]))] = copy.deepcopy(draw(VALUES))
            case "scale" if type(holder[key]) in (int, float):
                holder[key] = holder[key] * draw(st.sampled_from((-1, 0, 2, 1000, 10**9, 0.5)))
            case _:
                holder[key] = copy.deepcopy(draw(VALUES))
    return data["root"]


@contextmanager
def bounded():
    """Fail on a hang, and on memory beyond any need of this store."""

    def hang(*_):
        raise AssertionError(f"more than {MOST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(MOST_SECONDS)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def data_of(path):
    store = TeacherStore(path)
    return [
        (s.status, s.digest, *(a.tobytes() for a in s.payload.arrays().values()))
        for s in (store[index] for index in range(len(store)))
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("whole") / "s.zarr", MANIFEST, lengths=(3, 40))


@pytest.fixture(scope="module")
def expected(whole):
    return data_of(whole)


@pytest.fixture(scope="module")
def path(whole, tmp_path_factory):
    return shutil.copytree(whole, tmp_path_factory.mktemp("mutated") / "s.zarr")


@contextmanager
def restored(path, whole):
    try:
        yield
    finally:
        for name in ("zarr.json", "parts/00000/zarr.json", "parts/00001/zarr.json", *ARRAYS):
            (path / name).write_bytes((whole / name).read_bytes())


IN_PARTS = ("stats", "topk/gap", "topk/bottom", "hidden/state", "samples/offset", "samples/digest", "samples/status")
ARRAYS = (
    *(f"parts/00001/{name}/zarr.json" for name in IN_PARTS),
    "vocab/id_of_rank/zarr.json",
    "hidden/step/zarr.json",
)


def judge(path, expected=None):
    """Everything that reads a store either refuses it by a StoreError that names it, or reads; then what `expected` says."""
    for act in (data_of, describe, status, lambda path: list(verify(TeacherStore(path)))):
        with bounded():
            try:
                found = act(path)
            except StoreError as error:
                told = str(error)
                found = None
        if found is None:
            assert str(path) in told and told.encode()
        elif act is data_of and expected is not None:
            assert found == expected


def examples(fast, full):
    return pytest.mark.parametrize("count", (pytest.param(fast, id="some"), pytest.param(full, id="many", marks=FULL)))


@examples(60, 4000)
def test_the_manifest(path, whole, count):
    manifest = resealed.manifest_of(whole)

    @settings(FUZZ, max_examples=count)
    @given(mutated(manifest), st.booleans())
    def check(data, identity):
        with restored(path, whole):
            resealed.write_manifest(path, data, identity and isinstance(data, dict) and data.keys() >= manifest.keys())
            judge(path)

    check()


@examples(60, 4000)
def test_a_parts_record(path, whole, expected, count):
    @settings(FUZZ, max_examples=count)
    @given(mutated(resealed.record_of(part_path(whole, 1))))
    def check(data):
        with restored(path, whole):
            resealed.write_record(part_path(path, 1), data)
            judge(path, expected)

    check()


@examples(90, 6000)
def test_an_arrays_metadata(path, whole, expected, count):
    about = {name: json.loads((whole / name).read_text()) for name in ARRAYS}

    @settings(FUZZ, max_examples=count)
    @given(st.sampled_from(ARRAYS).flatmap(lambda name: st.tuples(st.just(name), mutated(about[name]))))
    def check(found):
        name, data = found
        with restored(path, whole):
            (path / name).write_text(json.dumps(data))
            if name.startswith("parts"):
                resealed.reseal(part_path(path, 1), crc32c=False)
            judge(path, expected)

    check()


@examples(60, 4000)
def test_any_bytes_in_the_place_of_metadata(path, whole, expected, count):
    """Cut, repeated or spliced text, which is hardly ever JSON; part records and array metadata, without their digests."""
    names = ("zarr.json", "parts/00001/zarr.json", *ARRAYS)

    @settings(FUZZ, max_examples=count)
    @given(st.sampled_from(names), st.integers(0, 1 << 16), st.integers(0, 1 << 16), st.binary(max_size=20))
    def check(name, begin, end, inside):
        with restored(path, whole):
            data = (whole / name).read_bytes()
            (path / name).write_bytes(data[: begin % len(data)] + inside + data[end % len(data) :])
            if name in ARRAYS and name.startswith("parts"):
                resealed.reseal(part_path(path, 1), crc32c=False)
            judge(path, expected)

    check()


@examples(60, 4000)
def test_any_bytes_in_the_place_of_a_shard(path, whole, count):
    """With right digests in the part's record; checksums inside the shard are right only where nothing was changed."""
    part = part_path(whole, 1)
    names = [str(file.relative_to(part)) for file in part.rglob("*") if file.is_file() and "/c/" in str(file)]

    @settings(FUZZ, max_examples=count)
    @given(st.sampled_from(sorted(names)), st.integers(0, 1 << 16), st.integers(0, 1 << 16), st.binary(max_size=20))
    def check(name, begin, end, inside):
        file = part_path(path, 1) / name
        data = (part / name).read_bytes()
        try:
            with restored(path, whole):
                file.write_bytes(data[: begin % len(data)] + inside + data[end % len(data) :])
                resealed.reseal(part_path(path, 1), crc32c=False)
                judge(path)
        finally:
            file.write_bytes(data)

    check()
