"""Teacher stores on an object store: what the local ones do, against a moto server on loopback."""

import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import moto_server
import numpy as np
import pytest
import synthetic
import tiny
from click.testing import CliRunner
from torch.utils.data import DataLoader

from switchkd.cli.main import main
from switchkd.errors import RunError, StoreError, StoreMismatch
from switchkd.stores import StoreTables, TeacherStore
from switchkd.stores.info import describe
from switchkd.stores.layout import GAP, ID_OF_RANK
from switchkd.stores.reader import pick_store
from switchkd.stores.status import status
from switchkd.stores.storage.open import open_storage
from switchkd.stores.storage.paths import PARTS, part_key, writer_prefix
from switchkd.stores.verify import missing_parts, repair, verify

pytestmark = pytest.mark.s3
obstore = pytest.importorskip("obstore", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto[server]: make test-s3")
pytest.importorskip("flask", reason="needs moto[server]: make test-s3")

MANIFEST = synthetic.manifest()
server = moto_server.server


@pytest.fixture
def folder(server):
    """A prefix that no other test uses."""
    return f"s3://bucket/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def url(folder):
    return f"{folder}/s.zarr"


@pytest.fixture
def filled(url):
    """A whole store, to be read or damaged."""
    return synthetic.fill(url, MANIFEST)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same store in a folder; no test writes to it."""
    return synthetic.fill(tmp_path_factory.mktemp("local") / "s.zarr", MANIFEST)


def bucket(url):
    return obstore.store.from_url(url)


def objects(url):
    """Every object of a store, by its key inside it."""
    there = bucket(url)
    names = [meta["path"] for chunk in obstore.list(there) for meta in chunk]
    return {name: bytes(obstore.get(there, name).bytes()) for name in names}


def assert_same_bytes(url, local):
    assert synthetic.without_writer(objects(url)) == synthetic.without_writer(synthetic.contents(local))


def put(url, key, data):
    obstore.put(bucket(url), key, data)


def delete(url, key):
    obstore.delete(bucket(url), key)


def assert_same_samples(url, local):
    found, expected = TeacherStore(url), TeacherStore(local)
    assert found.manifest == expected.manifest
    for index in range(len(expected)):
        assert_same(found[index], expected[index])
    indices = np.random.default_rng(0).permutation(len(expected)).tolist()
    together, wanted = TeacherStore(url).payload(indices), expected.payload(indices)
    for name, array in wanted.arrays().items():
        assert np.array_equal(getattr(together, name), array)


def assert_same(a, b):
    assert (a.status, a.digest) == (b.status, b.digest)
    assert all(np.array_equal(array, b.payload.arrays()[name]) for name, array in a.payload.arrays().items())


# Writing and reading


def test_every_sample_is_the_local_stores(filled, local):
    assert_same_samples(filled, local)


def test_every_object_is_the_local_stores_file(filled, local):
    assert_same_bytes(filled, local)


def test_hidden_states_come_back(url, tmp_path):
    of = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=40, samples=5)
    assert_same_samples(synthetic.fill(url, of), synthetic.fill(tmp_path / "s.zarr", of))


def test_a_url_may_end_in_a_slash(filled):
    assert TeacherStore.open(f"{filled}/").path == filled


def test_statuses_and_parts(filled, local):
    assert TeacherStore(filled).parts() == [0, 1, 2, 3, 4]
    assert np.array_equal(TeacherStore(filled).statuses(), TeacherStore(local).statuses())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_spawned_workers_read_the_same(filled, local):
    expected = TeacherStore(local)
    loader = DataLoader(TeacherStore(filled), batch_size=None, num_workers=2, multiprocessing_context="spawn")
    for index, found in enumerate(loader):
        assert_same(found, expected[index])


def test_forked_workers_say_what_to_do(filled):
    """obstore's threads do not survive a fork; without the check a worker would hang."""
    loader = DataLoader(TeacherStore(filled), batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RunError, match="cannot be read in a forked process: start workers with spawn"):
        next(iter(loader))
    assert TeacherStore(filled)[0].status in (0, 1, 2)  # and the parent goes on


# Resuming, competing


def test_missing_parts_only_are_written(url, local):
    synthetic.fill(url, MANIFEST, shard=(1, 2))
    writer = synthetic.open_writer(url, MANIFEST)
    assert writer.missing_parts() == [0, 2, 4]
    assert [writer.has_part(part) for part in range(5)] == [False, True, False, True, False]
    synthetic.fill(url, MANIFEST)
    assert_same_bytes(url, local)


DIE = """
import os, signal, sys
import synthetic
from switchkd.stores.storage.object_store import ObjectStorage
create, left = ObjectStorage._create, iter(range(int(sys.argv[2])))
def dying(self, key, data):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return create(self, key, data)
ObjectStorage._create = dying
synthetic.fill(sys.argv[1], synthetic.manifest())
"""


@pytest.mark.parametrize("uploads", (0, 2, 4, 5, 9, 30, 60))  # creation takes 5, a part some 15
def test_a_killed_writer_loses_its_unfinished_part_only(url, local, uploads):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    killed = subprocess.run([sys.executable, "-c", DIE, url, str(uploads)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert len(objects(url)) <= uploads
    if uploads < 5:
        with pytest.raises(StoreError, match="is not a teacher store"):
            TeacherStore(url)
    else:
        there = TeacherStore(url).parts()
        assert there == [int(name) for name in sorted(open_storage(url).parts())]
        for part in there:
            assert TeacherStore(url).part_positions(part) == synthetic.part_arrays(MANIFEST, part).positions.sum()
    synthetic.fill(url, MANIFEST)
    assert_same_bytes(url, local)


def test_objects_without_a_marker_are_no_part(url, local):
    """Those of a dead writer are written over, and what does not belong to the part is removed."""
    synthetic.fill(url, MANIFEST, shard=(0, 2))
    put(url, f"{part_key(1)}/{GAP}/c/0/0", b"half")
    put(url, f"{part_key(1)}/old/c/0", b"older")
    assert TeacherStore(url).parts() == [0, 2, 4]
    with pytest.raises(StoreError, match=r"s\.zarr has no part 1; run the same"):
        TeacherStore(url)[4]
    with pytest.raises(StoreError, match="holds 3 of 5 parts"):
        TeacherStore(url).check_complete()
    synthetic.fill(url, MANIFEST)
    assert_same_bytes(url, local)


def test_the_second_writer_of_a_part_changes_nothing(filled, local):
    writer = synthetic.open_writer(filled, MANIFEST)
    arrays = synthetic.part_arrays(MANIFEST, 2)
    other = replace(arrays, digest=arrays.digest + np.uint64(1))
    assert writer.write_part(2, other) is False
    writer._storage.has_part = lambda part: False  # it was committed while this writer computed
    assert writer.write_part(2, other) is False
    assert_same_bytes(filled, local)


def test_a_part_committed_during_the_upload_is_left_alone(url, local):
    synthetic.fill(url, MANIFEST, shard=(1, 2))
    writer = synthetic.open_writer(url, MANIFEST)
    storage, upload = writer._storage, writer._storage._upload

    def overtaken(file, key, part):
        if not storage.has_part(part):
            synthetic.open_writer(url, MANIFEST).write_part(part, synthetic.part_arrays(MANIFEST, part))
        return upload(file, key, part)

    storage._upload = overtaken
    storage.map = lambda function, items: [function(item) for item in items]
    arrays = synthetic.part_arrays(MANIFEST, 2)
    assert writer.write_part(2, replace(arrays, digest=arrays.digest + np.uint64(1))) is False
    synthetic.fill(url, MANIFEST)
    assert_same_bytes(url, local)


@pytest.mark.parametrize("shards", [[(i, 3) for i in range(3)], [(0, 1)] * 3], ids=("own parts", "the same parts"))
def test_writers_at_once_fill_one_store(url, local, shards):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda shard: synthetic.fill(url, MANIFEST, shard=shard), shards))
    assert_same_bytes(url, local)


@pytest.mark.parametrize("marker_first", (True, False))
def test_creators_with_different_tables_agree_on_the_first(url, marker_first, local):
    """A second creator comes after the first one's store, or after its rank table alone."""

    def overtaken():
        synthetic.open_writer(url, MANIFEST)
        if not marker_first:
            delete(url, "zarr.json")
        return StoreTables(np.arange(MANIFEST.vocab_rows, dtype=np.uint32))

    synthetic.StoreWriter(url, MANIFEST, overtaken)
    assert np.array_equal(TeacherStore(url).id_of_rank, synthetic.id_of_rank(MANIFEST.vocab_rows))
    assert_same_bytes(synthetic.fill(url, MANIFEST), local)


def test_other_settings_are_refused_by_name(filled):
    with pytest.raises(StoreMismatch, match=f"^{filled} was begun with other settings:\n  k: store 6, here 8\n"):
        synthetic.open_writer(filled, replace(MANIFEST, top_k=8))


# Several stores, damage, verify and repair


def test_several_stores_below_one_prefix(folder):
    for name, changed in {"a": {}, "b": {"tokenizer": "t1"}}.items():
        synthetic.fill(f"{folder}/{name}.zarr", synthetic.manifest(samples=1, **changed), lengths=(2,))
    put(folder, "c.zarr/parts/zarr.json", b"{}")  # not finished: no marker
    put(folder, "notes.txt", b"mine")
    with pytest.raises(StoreError, match=f"{folder} holds 2 stores, name one: {folder}/a.zarr, {folder}/b.zarr"):
        TeacherStore.open(folder)
    assert pick_store(folder, {"tokenizer": "t1"}).path == f"{folder}/b.zarr"
    with pytest.raises(StoreMismatch, match=rf"no store fits this run:\n{folder}/a\.zarr\n  tokenizer"):
        pick_store(folder, {"tokenizer": "t2"})


def test_the_only_store_below_a_prefix(folder, filled):
    assert TeacherStore.open(folder).path == filled


def test_no_store_says_how_to_make_one(folder):
    message = f"no teacher store at {folder}; `switchkd cache-teacher --out {folder}/NAME.zarr` makes one"
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        TeacherStore.open(folder)


def test_a_deleted_object_is_found(filled):
    delete(filled, f"{part_key(3)}/{GAP}/c/0/0")
    with pytest.raises(StoreError, match=rf"{filled}/{part_key(3)}/{GAP}/c/0/0 should have \d+ bytes, found nothing"):
        TeacherStore(filled)[12]


def test_a_changed_object_is_found(filled):
    for key, message in ((f"{GAP}/c/0/0", GAP), ("stats/zarr.json", r"stats/zarr\.json is not what was written")):
        name = f"{part_key(3)}/{key}"
        kept = objects(filled)[name]
        put(filled, name, bytes([kept[0] ^ 1, *kept[1:]]))
        with pytest.raises(StoreError, match=message):
            [TeacherStore(filled)[index] for index in range(12, 16)]
        put(filled, name, kept)
    assert len([TeacherStore(filled)[index] for index in range(12, 16)]) == 4


def test_a_deleted_rank_table_is_found(filled):
    delete(filled, f"{ID_OF_RANK}/c/0")
    with pytest.raises(StoreError, match="not each of 50 ids once"):
        TeacherStore(filled)


def test_repair_drops_the_bad_parts_and_the_next_run_writes_exactly_these(filled, local):
    assert [part for part, findings in verify(TeacherStore(filled)) if findings] == []
    kept = objects(filled)[f"{part_key(2)}/{GAP}/c/0/0"]
    put(filled, f"{part_key(2)}/{GAP}/c/0/0", bytes([*kept[:-1], kept[-1] ^ 1]))
    delete(filled, f"{part_key(4)}/stats/c/0/0")
    put(filled, f"{part_key(0)}/notes.txt", b"mine")
    assert repair(TeacherStore(filled)).dropped == [0, 2, 4]
    assert missing_parts(TeacherStore(filled)) == [0, 2, 4]
    assert {key.split("/")[1] for key in objects(filled) if key.startswith(PARTS)} == {"zarr.json", "00001", "00003"}
    synthetic.fill(filled, MANIFEST)
    assert_same_bytes(filled, local)


def test_describe_is_the_local_stores(filled, local):
    assert replace(describe(filled), path=local) == describe(local)


def test_status_is_read_from_the_bucket(url):
    writer = synthetic.open_writer(url, MANIFEST)
    for part in (3, 1):
        writer.write_part(part, synthetic.part_arrays(MANIFEST, part))
    found = status(url)
    assert (found.done, found.missing, found.samples) == ([1, 3], [0, 2, 4], 8)
    assert [w.name for w in found.writers] == [writer_prefix()]


# What cannot be reached


def test_a_server_that_is_not_there(filled, monkeypatch):
    store = TeacherStore(filled)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=rf"cannot reach {filled}/zarr\.json: .*run the same command again"):
        TeacherStore(filled)
    with pytest.raises(RunError, match="cannot reach .*what is committed is whole"):
        synthetic.fill(filled, MANIFEST)
    assert store[0].status in (0, 1, 2)  # opened before, with the endpoint of then


def test_a_network_that_fails_during_a_read_is_no_damage(filled, monkeypatch):
    store = TeacherStore(filled)
    store.part_statuses(0)

    def lost(*_, **__):
        raise obstore.exceptions.GenericError("Generic S3 error: connection reset")

    for name in ("get", "get_ranges"):
        monkeypatch.setattr(obstore, name, lost)
    with pytest.raises(RunError, match="connection reset.*run the same command again") as caught:
        [store[index] for index in range(4)]
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("s3://no-such-bucket/s.zarr", "cannot create s3://no-such-bucket/s.zarr: .*no such object or bucket"),
        ("ftp://host/s.zarr", "a store lies in a folder or at s3://"),
        ("s3://", "cannot be used"),
        (Path("s3://bucket/s.zarr"), "lost a slash as a Path: give it as text"),
    ],
    ids=str,
)
def test_a_place_where_no_store_can_be(server, there, message):
    with pytest.raises(StoreError, match=message):
        synthetic.open_writer(there, MANIFEST)


def test_without_obstore_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from switchkd.stores import TeacherStore\n"
        "from switchkd.errors import StoreError\n"
        "try: TeacherStore('s3://bucket/s.zarr')\nexcept StoreError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "a store at a URL needs obstore: pip install 'switchkd[s3]'"


# The command line


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_whole_way(folder, teacher, student, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    data = tiny.data(tmp_path / "data", tiny.rows(6, text_only=(1,)))
    common = ("--teacher", tmp_path / "teacher", "--data", data, "--images", tmp_path / "data/images")
    cache = ("cache-teacher", *common, "--template", "qa", "--part-size", 4)
    train = ("train", *common, "--student", student, "--steps", 2, "--batch-size", 3)
    out = f"{folder}/t.zarr"

    half = run(*cache, "--out", out, "--shard", "0/2")
    assert half.exit_code == 0, half.output
    assert f"{out}: 1 part written, 0 there before, 1 left to other workers" in half.stdout
    refused = run(*train, "--cache", folder, "--output", tmp_path / "early")
    assert refused.exit_code == 2
    assert "holds 1 of 2 parts" in refused.output
    whole = run(*cache, "--out", out, "--workers", 1)  # forked, but they do not read the store
    assert whole.exit_code == 0, whole.output
    assert f"{out}: 1 part written, 1 there before, 0 left to other workers" in whole.stdout
    assert run(*cache, "--out", tmp_path / "stores/t.zarr").exit_code == 0
    assert_same_bytes(out, tmp_path / "stores/t.zarr")

    assert f"store       {out}\n" in run("store", "info", out).output
    assert "2 parts good, 0 bad, 0 missing" in run("store", "verify", folder).output
    assert "dropped parts: none" in run("store", "repair", out).output
    assert run("store", "audit", out, *common, "-n", 3).exit_code == 0

    losses = [
        trained(run(*train, "--cache", place, "--output", tmp_path / f"run-{number}", *more))
        for number, (place, more) in enumerate([(tmp_path / "stores", ()), (folder, ()), (out, ("--workers", 1))])
    ]
    assert losses[0] == losses[1] == losses[2]


def trained(done):
    assert done.exit_code == 0, done.output
    assert "trained for 2 steps on 6 samples; skipped: none" in done.stdout
    return done.stdout.partition("last losses: ")[2]
