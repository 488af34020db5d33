"""Reading a store: what was handed to the writer comes back, from any process; what is not a store is refused."""

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from torch.utils.data import DataLoader

from switchkd.errors import StoreError, StoreMismatch
from switchkd.stores import Payload, TeacherStore, layout
from switchkd.stores.info import describe
from switchkd.stores.layout import STAT_COLUMNS
from switchkd.stores.payload import empty_payload
from switchkd.stores.reader import pick_store, read_manifest
from switchkd.stores.storage import paths
from switchkd.stores.storage.local import LocalStorage
from switchkd.stores.storage.paths import part_path

README = Path(__file__).parents[2] / "stores/README.md"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A whole store; no test writes to it."""
    return synthetic.fill(tmp_path_factory.mktemp("store") / "NAME.zarr", synthetic.manifest())


def lengths(of):
    return [len(synthetic.sample_arrays(of, index)["ids"]) for index in range(of.samples)]


def by_id(ids, values):
    return np.take_along_axis(values, np.argsort(ids, axis=-1), -1)


def assert_is(found, handed, coarse):
    """`found` is the sample that was handed over, logits within half a coarse step."""
    assert (found.status, found.digest) == (handed["status"], handed["digest"])
    assert (found.payload.ids.dtype, found.payload.logits.dtype, found.payload.stats.dtype) == (
        np.int32,
        np.float32,
        np.float32,
    )
    assert found.payload.ids.shape == found.payload.logits.shape == handed["ids"].shape
    assert np.array_equal(np.sort(found.payload.ids, -1), np.sort(handed["ids"], -1))
    difference = by_id(found.payload.ids, found.payload.logits) - by_id(handed["ids"], handed["logits"])
    assert (np.abs(difference) <= coarse / 2 + 1e-5).all()
    assert (np.diff(found.payload.logits, axis=-1) <= 0).all()
    assert np.array_equal(found.payload.stats, handed["stats"])


def assert_same(a, b):
    assert (a.status, a.digest) == (b.status, b.digest)
    assert a.payload.arrays().keys() == b.payload.arrays().keys()
    for name, array in a.payload.arrays().items():
        assert np.array_equal(array, b.payload.arrays()[name]), name


def edit_manifest(path, edit):
    data = json.loads((path / "zarr.json").read_text())
    edit(data["attributes"]["switchkd"])
    (path / "zarr.json").write_text(json.dumps(data))


# Reading back


def test_every_sample_comes_back(path):
    store = TeacherStore.open(path)
    assert len(store) == store.manifest.samples == 18
    for index in range(len(store)):
        assert_is(store[index], synthetic.sample_arrays(store.manifest, index), store.manifest.coarse)


def test_the_store_holds_the_cases_that_matter():
    """The seeds give samples without positions, and samples that lie in one, two and three chunks."""
    of = synthetic.manifest()
    seen, size = set(), layout.chunk_positions((1, of.top_k))
    for part in range(of.part_count):
        ends = np.cumsum(synthetic.part_arrays(of, part).positions)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            seen.add((end - 1) // size - begin // size + 1 if end > begin else 0)
    assert {0, 1, 2, 3} <= seen


@pytest.mark.parametrize(
    "changed",
    [
        {"top_k": 2},
        {"top_k": 50},  # K = N: the tail is empty
        {"fine": 1 / 1024, "coarse": 1 / 1024},
        {"coarse": 0.5},
        {"part_size": 1},
        {"part_size": 18},
        {"part_size": 500},
        {"vocab_rows": 70_000, "samples": 2, "part_size": 2},
    ],
    ids=str,
)
def test_other_settings_come_back(tmp_path, changed):
    of = synthetic.manifest(**{"samples": 6, **changed})
    few = (0, 5, 30)
    store = TeacherStore(synthetic.fill(tmp_path / "s.zarr", of, lengths=few))
    assert store.manifest == of
    for index in range(of.samples):
        assert_is(store[index], synthetic.sample_arrays(of, index, few), of.coarse)


def test_an_empty_tail_is_minus_infinity(tmp_path):
    of = synthetic.manifest(top_k=50, samples=1, part_size=1)
    store = TeacherStore(synthetic.fill(tmp_path / "s.zarr", of, lengths=(7,)))
    assert store[0].payload.stat("tail_logsumexp").tolist() == [-np.inf] * 7


def test_statistics_are_named(path):
    store = TeacherStore(path)
    index = lengths(store.manifest).index(600)
    for column, name in enumerate(STAT_COLUMNS):
        assert np.array_equal(store[index].payload.stat(name), store[index].payload.stats[:, column])
    coarse = store.manifest.coarse
    assert np.abs(store[index].payload.stat("z_max") - store[index].payload.logits[:, 0]).max() <= coarse / 2 + 1e-3


def test_a_bad_sample_has_a_status_and_no_position(path):
    store = TeacherStore(path)
    bad = np.flatnonzero(store.statuses())
    assert len(bad) > 0
    for index in map(int, bad):
        found = store[index]
        assert str(found.status) in store.manifest.statuses
        assert found.payload.ids.shape == found.payload.logits.shape == (0, 6)
        assert found.payload.stats.shape == (0, 5)


def test_a_sample_gives_its_arrays_by_name_and_says_what_it_lacks(path):
    store = TeacherStore(path)
    good, skipped = (int(np.flatnonzero((store.statuses() == 0) == usable)[0]) for usable in (True, False))
    sample = store[good]
    assert sample.ids is sample.payload.ids and sample.logits is sample.payload.logits
    assert sample.stats is sample.payload.stats and sample.index == good
    assert repr(sample) == f"StoredSample({good}: {len(sample.payload)} positions, stats, ids, logits)"
    with pytest.raises(StoreError, match="this store keeps no hidden"):
        sample.hidden  # noqa: B018
    reason = store.manifest.statuses[str(store[skipped].status)]
    assert repr(store[skipped]) == f"StoredSample({skipped}: skipped, {reason})"
    with pytest.raises(StoreError, match=rf"sample {skipped} was skipped .*\({reason}\): it has no logits"):
        store[skipped].logits  # noqa: B018


def test_tokens_of_the_samples(path, tmp_path):
    """0 where a sample is not usable, and in a part that does not record them."""
    store = TeacherStore(path)
    tokens = [synthetic.part_arrays(store.manifest, part).tokens for part in range(store.manifest.part_count)]
    assert store.tokens().tolist() == np.concatenate(tokens).tolist()
    assert ((store.tokens() == 0) == (store.statuses() != 0)).all()
    first = TeacherStore(synthetic.fill(tmp_path / "first.zarr", synthetic.manifest(version=1)))
    assert not first.tokens().any()
    assert not list(first.path.rglob("tokens"))


def test_a_part_without_any_position(tmp_path):
    of = synthetic.manifest(samples=3)
    store = TeacherStore(synthetic.fill(tmp_path / "s.zarr", of, lengths=(0,)))
    assert store.part_positions(0) == 0
    assert store.part_stats(0).shape == (0, 5)
    for index in range(3):
        assert_is(store[index], synthetic.sample_arrays(of, index, (0,)), of.coarse)


def test_parts_tell_statuses_positions_and_statistics(path):
    store = TeacherStore(path)
    assert store.parts() == [0, 1, 2, 3, 4]
    handed = [synthetic.part_arrays(store.manifest, part) for part in store.parts()]
    assert np.array_equal(store.statuses(), np.concatenate([arrays.status for arrays in handed]))
    for part, arrays in enumerate(handed):
        assert np.array_equal(store.part_statuses(part), arrays.status)
        assert np.array_equal(store.part_stats(part), arrays.payload.stats)
        assert store.part_positions(part) == arrays.positions.sum()


@pytest.mark.parametrize("index", (-1, 18, 1000))
def test_an_index_out_of_range_is_an_index_error(path, index):
    with pytest.raises(IndexError, match=rf"^sample {index} of a store with 18$"):
        TeacherStore(path)[index]


def test_a_numpy_index_is_an_index(path):
    assert_same(TeacherStore(path)[np.int64(7)], TeacherStore(path)[7])


@pytest.mark.parametrize("payload", ("hidden", "both"))
@pytest.mark.parametrize("dtype", ("steps", "float16", "bfloat16"))
def test_hidden_states_come_back(tmp_path, payload, dtype):
    topk = {} if payload == "both" else {"top_k": 0, "fine": 0.0, "coarse": 0.0}
    of = synthetic.manifest(payload=payload, hidden_dtype=dtype, hidden_width=40, samples=9, **topk)
    store = TeacherStore(synthetic.fill(tmp_path / "s.zarr", of))
    for index in range(len(store)):
        found, handed = store[index].payload, synthetic.sample_arrays(of, index)
        assert found.hidden.shape == handed["hidden"].shape
        assert np.abs(found.hidden - handed["hidden"]).max(initial=0) < 0.03
        assert (found.ids is None) == (payload == "hidden")


def test_changing_what_was_read_changes_nothing_in_the_store(path):
    store = TeacherStore(path)
    index = lengths(store.manifest).index(3)
    expected = TeacherStore(path)[index]
    for array in store[index].payload.arrays().values():
        array[...] = 0
    assert_same(store[index], expected)


def test_a_manifest_with_a_changed_value_is_refused(tmp_path):
    path = synthetic.fill(tmp_path / "s.zarr", synthetic.manifest(samples=1))
    edit_manifest(path, lambda manifest: manifest.update(coarse=0.25))
    with pytest.raises(StoreError, match="is not what was written: its checksum differs"):
        TeacherStore(path)


# Caching and processes


@pytest.mark.parametrize("cache_bytes", (0, 1, 20_000))  # nothing fits, nothing fits, one chunk fits
def test_a_small_cache_reads_the_same(path, cache_bytes):
    small, large = TeacherStore(path, cache_bytes), TeacherStore(path)
    for index in np.random.default_rng(0).permutation(np.repeat(np.arange(len(large)), 2)).tolist():
        assert_same(small[index], large[index])


def test_what_was_read_is_not_read_again(path, monkeypatch):
    store = TeacherStore(path)
    index = lengths(store.manifest).index(600)
    first = store[index]
    monkeypatch.setattr(
        store.storage, "read_ranges", lambda requests: iter([pytest.fail("read from disk")] if requests else [])
    )
    assert_same(store[index], first)


@pytest.fixture
def asked(monkeypatch):
    """What is asked of a store's folder: the files of every call, and how many runs of bytes of each."""
    calls = []
    ranges = LocalStorage.read_ranges
    monkeypatch.setattr(
        LocalStorage,
        "read_ranges",
        lambda self, requests: calls.append([(k, len(s)) for k, s in requests]) or ranges(self, requests),
    )
    return calls


def test_one_sample_reads_its_chunks_only(path, asked):
    store = TeacherStore(path, cache_bytes=0)
    index = lengths(store.manifest).index(3)
    store.digest(index)  # opens the part
    asked.clear()
    store[index]
    indexes, chunks = asked
    assert len(indexes) == len(chunks) == len(store.manifest.position_arrays)
    assert all(1 <= runs <= 2 for _, runs in chunks)
    asked.clear()
    store[index]
    assert asked == [[], chunks]  # indexes are read once


@pytest.mark.parametrize("cache_bytes", (0, 20_000, 1 << 20))
@pytest.mark.parametrize("of", [{}, {"payload": "both", "hidden_dtype": "steps", "hidden_width": 400, "top_k": 15}])
def test_several_samples_are_those_samples_joined(tmp_path, of, cache_bytes):
    of = synthetic.manifest(samples=18, **of)
    path = synthetic.fill(tmp_path / "s.zarr", of)
    each = [sample.payload for sample in map(TeacherStore(path).__getitem__, range(18))]
    store, random = TeacherStore(path, cache_bytes), np.random.default_rng(0)
    # In any order, twice, in one part, empty samples alone, none.
    empty = [index for index, length in enumerate(lengths(of)) if length == 0]
    for indices in (random.permutation(18).tolist(), [3, 3, 5, 3], [0, 1, 2], empty, [], range(18)):
        found = store.payload(indices)
        expected = Payload.concatenate([empty_payload(of, 0), *(each[index] for index in indices)])
        assert found.arrays().keys() == expected.arrays().keys()
        for name, array in found.arrays().items():
            assert array.dtype == getattr(expected, name).dtype
            assert np.array_equal(array, getattr(expected, name)), name


def test_several_samples_are_asked_for_at_once(path, asked):
    store = TeacherStore(path)
    store.statuses()  # opens the parts
    asked.clear()
    store.payload(range(len(store)))
    _, chunks = asked
    assert len({key.split("/")[1] for key, _ in chunks}) == store.manifest.part_count


@pytest.mark.parametrize("index", (-1, 18))
def test_a_sample_that_is_not_there(path, index):
    store = TeacherStore(path)
    for read in (store.__getitem__, store.digest, lambda index: store.payload([0, index])):
        with pytest.raises(IndexError, match=f"sample {index} of a store with 18"):
            read(index)


def test_a_rank_that_the_table_lacks_is_damage(path, monkeypatch):
    store = TeacherStore(path)
    monkeypatch.setattr(store, "_ids", store._ids[:5])
    index = lengths(store.manifest).index(3)
    where = re.escape(str(path / paths.part_key(index // store.manifest.part_size)))
    with pytest.raises(StoreError, match=f"^{where}: ranks reach .* the vocabulary has 5 rows; it was damaged"):
        store[index]


@pytest.mark.parametrize(("least", "most"), [(1, 1), (256, 256)])
def test_chunks_of_another_size_read_the_same(tmp_path, monkeypatch, least, most):
    """A reader takes the size of a chunk from the array: it was 256 positions for every array once."""
    monkeypatch.setattr(layout, "CHUNK_POSITIONS", (least, most))
    of = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=400, samples=9)
    other = TeacherStore(synthetic.fill(tmp_path / "other.zarr", of))
    monkeypatch.undo()
    store = TeacherStore(synthetic.fill(tmp_path / "s.zarr", of))
    for index in range(len(store)):
        assert_same(other[index], store[index])
    assert other._part(0).arrays[layout.STATE].chunk_rows != store._part(0).arrays[layout.STATE].chunk_rows


def test_a_pickled_store_reads_the_same_and_carries_no_data(path):
    store = TeacherStore(path, cache_bytes=12_345_678)
    expected = store[7]
    data = pickle.dumps(store)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.cache_bytes == 12_345_678
    assert_same(again[7], expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@pytest.mark.parametrize("context", ("fork", "spawn"))
def test_dataloader_workers_read_the_same(path, context):
    store = TeacherStore(path)
    expected = [store[index] for index in range(len(store))]  # the parent has used zarr's threads before it forks
    loader = DataLoader(store, batch_size=None, num_workers=2, multiprocessing_context=context)
    for found, wanted in zip(loader, expected, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("pipeline", ("zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"))
def test_plain_zarr_reads_what_the_readme_says(tmp_path, pipeline):
    """The README's snippets, run without a line of ours, give every bit of what `TeacherStore` gives."""
    if importlib.util.find_spec(pipeline.split(".")[0]) is None:
        pytest.skip("needs zarrs: the extra `fast`")
    of = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=40, top_k=40, coarse=0.5)
    path = synthetic.fill(tmp_path / "NAME.zarr", of)
    snippet, of_states = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    check = (
        "\nimport sys\nassert 'switchkd' not in sys.modules\n"
        "np.savez('out.npz', ids=ids, logits=logits, stats=stats, hidden=hidden)\n"
        f"assert type(part['stats']._async_array.codec_pipeline).__name__ == {pipeline.split('.')[-1]!r}\n"
    )
    environment = os.environ | {"ZARR_CODEC_PIPELINE__PATH": pipeline}
    subprocess.run([sys.executable, "-c", snippet + of_states + check], cwd=tmp_path, check=True, env=environment)
    store = TeacherStore(path)
    index = int(re.search(r"^index = (\d+)$", snippet, re.MULTILINE).group(1))
    with np.load(tmp_path / "out.npz") as found:
        assert len(found["ids"]) == lengths(store.manifest)[index] > 0
        for name in ("ids", "logits", "stats"):
            assert np.array_equal(found[name], getattr(store[index].payload, name)), name
        assert found["logits"].dtype == np.float32
        assert np.array_equal(found["hidden"], store.part_payload(0).hidden)
        ranks = np.argsort(synthetic.id_of_rank(of.vocab_rows))[found["ids"]]
        equal = np.diff(found["logits"], axis=-1) == 0
        assert (np.diff(ranks, axis=-1)[equal] < 0).any()  # the order of equal levels is not that of ranks


def test_the_readme_names_every_field_of_the_manifest():
    text = README.read_text(encoding="utf-8")
    assert [name for name in synthetic.manifest().as_attributes() if f"| `{name}` |" not in text] == []


# Finding the store


def folder_of_stores(tmp_path, **manifests):
    """One store of one part per keyword, `NAME.zarr`."""
    for name, changed in manifests.items():
        of = synthetic.manifest(samples=1, **changed)
        synthetic.fill(tmp_path / f"stores/{name}.zarr", of, lengths=(2,))
    return tmp_path / "stores"


def test_open_takes_the_only_store_of_a_folder(tmp_path):
    folder = folder_of_stores(tmp_path, a={})
    (folder / "notes.txt").touch()
    (folder / ".b.zarr.1234abcd").mkdir()
    assert TeacherStore.open(folder).path == folder / "a.zarr"
    assert TeacherStore.open(str(folder / "a.zarr")).path == folder / "a.zarr"


@pytest.mark.parametrize("there", (True, False))
def test_open_says_how_to_make_a_store_where_none_is(tmp_path, there):
    folder = tmp_path / "stores"
    if there:
        folder.mkdir()
    message = f"no teacher store at {folder}; `switchkd cache-teacher --out {folder}/NAME.zarr` makes one"
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        TeacherStore.open(folder)


def test_open_lists_several_stores(tmp_path):
    folder = folder_of_stores(tmp_path, b={}, a={})
    message = f"{folder} holds 2 stores, name one: {folder / 'a.zarr'}, {folder / 'b.zarr'}"
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        TeacherStore.open(folder)


def test_pick_store_takes_the_one_that_fits(tmp_path):
    folder = folder_of_stores(
        tmp_path, a={"tokenizer": "t1"}, b={"top_k": 8}, c={"teacher": synthetic.manifest().teacher | {"config": "c9"}}
    )
    assert pick_store(folder, {"tokenizer": "t1"}).path == folder / "a.zarr"
    assert pick_store(folder, {"tokenizer": "t0", "top_k": 8}).path == folder / "b.zarr"
    assert pick_store(folder, {"teacher": {"config": "c9"}}).path == folder / "c.zarr"
    assert pick_store(folder / "a.zarr", {}).path == folder / "a.zarr"


def test_pick_store_names_field_and_both_values_of_each_misfit(tmp_path):
    folder = folder_of_stores(tmp_path, a={"tokenizer": "t1"}, b={})
    with pytest.raises(StoreMismatch) as caught:
        pick_store(folder, {"tokenizer": "t0", "teacher": {"language": "other", "vision": "v0"}})
    assert str(caught.value).splitlines() == [
        "no store fits this run:",
        f"{folder / 'a.zarr'}",
        "  tokenizer: store 't1', here 't0'",
        "  teacher language: store 'l0', here 'other'",
        f"{folder / 'b.zarr'}",
        "  teacher language: store 'l0', here 'other'",
        "Train with what the store was made with, or cache again",
    ]


def test_pick_store_names_several_that_fit(tmp_path):
    folder = folder_of_stores(tmp_path, a={}, b={}, c={"data": "d1"})
    message = f"2 stores in {folder} fit, name one: {folder / 'a.zarr'}, {folder / 'b.zarr'}"
    with pytest.raises(StoreMismatch, match=f"^{re.escape(message)}$"):
        pick_store(folder, {"data": "d0"})


def test_pick_store_where_none_is(tmp_path):
    with pytest.raises(StoreError, match=r"^no teacher store at"):
        pick_store(tmp_path, {})


# What is not a store, or not yet


@pytest.mark.parametrize("version", (3, 0, None, "1", True, 2.0))
def test_another_format_version_is_refused(tmp_path, version):
    path = folder_of_stores(tmp_path, a={}) / "a.zarr"
    edit_manifest(path, lambda manifest: manifest.update(version=version))
    with pytest.raises(
        StoreError, match=f"has format version {version}, this switchkd reads versions 1 and 2; use the switch"
    ):
        TeacherStore.open(path)


def test_missing_fields_of_a_manifest_are_named(tmp_path):
    path = folder_of_stores(tmp_path, a={}) / "a.zarr"
    edit_manifest(path, lambda manifest: [manifest.pop(name) for name in ("top_k", "fine")])
    with pytest.raises(StoreError, match=r"the manifest of .*a\.zarr lacks fine, top_k; it was damaged after writing"):
        TeacherStore.open(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", "{}", '{"attributes": null}', "\udcff"],
    ids=("empty", "cut", "list", "number", "null", "object", "no attributes", "not text"),
)
def test_a_zarr_json_that_is_none_is_not_a_store(tmp_path, content):
    (tmp_path / "zarr.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(StoreError, match=f"^{re.escape(str(tmp_path))} is not a teacher store: "):
        TeacherStore.open(tmp_path)


@pytest.mark.parametrize("attributes", ({}, {"switchkd": 3}, {"switchkd": {"format": "other", "version": 1}}), ids=str)
def test_another_zarr_group_is_not_a_store(tmp_path, attributes):
    data = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    (tmp_path / "zarr.json").write_text(json.dumps(data))
    with pytest.raises(StoreError, match=r"is a Zarr group but not a teacher store \(no 'switchkd-store' manifest\)$"):
        TeacherStore.open(tmp_path)


def test_no_file_is_not_a_store(tmp_path):
    with pytest.raises(StoreError, match=r"is not a teacher store: .*No such file"):
        read_manifest(tmp_path / "nothing.zarr")


def test_a_store_that_is_not_whole_says_how_to_finish(tmp_path):
    path = synthetic.fill(tmp_path / "s.zarr", synthetic.manifest(), shard=(0, 3), lengths=(2,))
    store = TeacherStore(path)
    assert store.parts() == [0, 3]
    again = "run the same `switchkd cache-teacher` command again"
    with pytest.raises(StoreError, match=rf"s\.zarr holds 2 of 5 parts; {again} to finish it$"):
        store.check_complete()
    with pytest.raises(StoreError, match=rf"s\.zarr has no part 1; {again}$"):
        store[4]
    with pytest.raises(StoreError, match="has no part 1"):
        store.statuses()


def test_a_part_that_comes_later_is_seen(tmp_path):
    of = synthetic.manifest()
    store = TeacherStore(synthetic.fill(tmp_path / "s.zarr", of, shard=(0, 3), lengths=(2,)))
    synthetic.fill(store.path, of, lengths=(2,))
    store.check_complete()
    assert_is(store[4], synthetic.sample_arrays(of, 4, (2,)), of.coarse)


# store info


def test_describe_a_whole_store(path):
    found = describe(path)
    of = synthetic.manifest()
    parts = [synthetic.part_arrays(of, part) for part in range(5)]
    status = np.concatenate([arrays.status for arrays in parts])
    knee = np.concatenate([arrays.payload.stats for arrays in parts])[:, STAT_COLUMNS.index("knee")]
    assert (found.path, found.manifest, found.parts, found.complete) == (path, of, 5, True)
    assert found.samples == (status == 0).sum()
    assert found.positions == len(knee) == sum(lengths(of))
    assert found.skipped == {
        name: count for code, name in of.statuses.items() if code != "0" and (count := (status == int(code)).sum())
    }
    assert found.store_bytes == sum(map(len, synthetic.contents(path).values()))
    assert list(found.knee_quantiles) == ["min", "5%", "median", "95%", "max"]
    assert found.knee_quantiles["min"] == knee.min()
    assert found.knee_quantiles["median"] == np.median(knee)
    assert found.knee_quantiles["max"] == knee.max()


def test_describe_counts_the_bytes_of_chunks(path):
    chunks = {
        name: data
        for name, data in synthetic.contents(path).items()
        if name.startswith("parts/") and not name.endswith("zarr.json")
    }
    found = describe(path)
    assert found.bytes_per_position * found.positions == pytest.approx(sum(map(len, chunks.values())))


def test_describe_a_store_without_parts(tmp_path):
    path = tmp_path / "s.zarr"
    synthetic.open_writer(path, synthetic.manifest())
    found = describe(path)
    assert (found.parts, found.complete, found.samples, found.positions) == (0, False, 0, 0)
    assert (found.bytes_per_position, found.skipped, found.knee_quantiles) == (0.0, {}, {})


def test_describe_a_store_of_bad_samples(tmp_path):
    found = describe(synthetic.fill(tmp_path / "s.zarr", synthetic.manifest(), lengths=(0,)))
    assert (found.complete, found.samples, found.positions, found.bytes_per_position) == (True, 0, 0, 0.0)
    assert sum(found.skipped.values()) == 18


def test_describe_a_damaged_store(tmp_path):
    path = synthetic.fill(tmp_path / "s.zarr", synthetic.manifest(samples=1), lengths=(2,))
    (part_path(path, 0) / "stats/zarr.json").unlink()
    with pytest.raises(StoreError, match=r"stats/zarr\.json should have \d+ bytes, found nothing"):
        describe(path)


def test_the_rank_table_is_the_given_one(path):
    assert np.array_equal(TeacherStore(path).id_of_rank, synthetic.id_of_rank(50))
