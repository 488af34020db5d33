"""The fault harness for object stores: lost answers, connections reset inside a body, busy servers, at every request.

Judgement, as for a file system (test_io_faults): the right data or a clear error; no sound part is called damaged or removed; after
one undisturbed rerun the store is the undisturbed one, byte for byte. `make test-s3` takes some of the requests, `make
test-faults` all.
"""

import uuid
from datetime import timedelta
from functools import partial

import lossy_proxy
import moto_server
import pytest
import synthetic

from switchkd.errors import RunError, StoreError
from switchkd.stores import TeacherStore
from switchkd.stores.info import describe
from switchkd.stores.status import status
from switchkd.stores.verify import repair, verify

pytestmark = [pytest.mark.s3, pytest.mark.timeout(3600)]
obstore = pytest.importorskip("obstore", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto[server]: make test-s3")
pytest.importorskip("flask", reason="needs moto[server]: make test-s3")

server = moto_server.server
MANIFEST = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8, samples=6, part_size=2)
LENGTHS = (0, 1, 3, 40)
# (fault, requests in a row): one that obstore's own retry outlasts, and one that it does not.
FAULTS = [(fault, times) for fault in lossy_proxy.FAULTS for times in (1, 50)]


@pytest.fixture(scope="module")
def proxy(server):
    with lossy_proxy.lossy(server) as proxy:
        yield proxy


@pytest.fixture
def url(proxy, monkeypatch):
    """A store behind the proxy. obstore gives up after a second instead of three minutes."""
    from switchkd.stores.storage import object_store

    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2}
    retry = {"backoff": backoff, "max_retries": 2, "retry_timeout": timedelta(seconds=1)}
    monkeypatch.setattr(object_store, "from_url", partial(obstore.store.from_url, retry_config=retry))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    proxy.disturb()
    return f"s3://bucket/{uuid.uuid4().hex[:8]}/s.zarr"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("undisturbed") / "s.zarr", MANIFEST, lengths=LENGTHS)


def objects(url):
    there = obstore.store.from_url(url)
    return {
        meta["path"]: bytes(obstore.get(there, meta["path"]).bytes()) for chunk in obstore.list(there) for meta in chunk
    }


def files_of(url):
    """Without the objects of unfinished parts, and without who wrote them."""
    return synthetic.without_writer({name: data for name, data in objects(url).items() if ".writing" not in name})


def remove(url):
    there = obstore.store.from_url(url)
    for chunk in obstore.list(there):
        obstore.delete(there, [meta["path"] for meta in chunk])


def samples_of(url):
    store = TeacherStore(url)
    found = [store[index] for index in range(len(store))]
    return [(s.status, s.digest, *(a.tobytes() for a in s.payload.arrays().values())) for s in found]


def requests_of(proxy, act):
    proxy.disturb()
    act()
    return len(proxy.requests)


def cases(total, stride):
    """Every fault at every request, or the faults in turn at some."""
    if stride == 1:
        return [(n, *fault) for n in range(1, total + 1) for fault in FAULTS]
    return [(n, *FAULTS[number % len(FAULTS)]) for number, n in enumerate(range(1, total + 1, stride))]


def strides(fast):
    full = pytest.param(1, id="all", marks=pytest.mark.faults)
    return pytest.mark.parametrize("stride", (pytest.param(fast, id="some"), full))


@strides(9)
def test_writing(url, proxy, undisturbed, stride):
    expected = synthetic.without_writer(synthetic.contents(undisturbed))
    fill = partial(synthetic.fill, url, MANIFEST, lengths=LENGTHS)
    total = requests_of(proxy, fill)
    failed = 0
    for n, fault, times in cases(total, stride):
        proxy.disturb()
        remove(url)
        proxy.disturb(fault, n, times)
        told = ""
        try:
            fill()
        except (RunError, StoreError) as error:
            failed += 1
            told = str(error)
        proxy.disturb()
        assert "delete" not in told and "damaged" not in told, (n, fault, told)
        for name, data in files_of(url).items():
            assert expected[name] == data, (n, fault, times, name)
        fill()
        assert files_of(url) == expected, (n, fault, times)
        assert [finding.message for _, found in verify(TeacherStore(url)) for finding in found] == []
    assert failed


@strides(7)
@pytest.mark.parametrize("act", (samples_of, describe, status), ids=lambda act: act.__name__)
def test_reading(url, proxy, act, stride):
    synthetic.fill(url, MANIFEST, lengths=LENGTHS)
    expected = act(url)
    total = requests_of(proxy, lambda: act(url))
    told = []
    for n, fault, times in cases(total, stride):
        proxy.disturb(fault, n, times)
        try:
            assert act(url) == expected, (n, fault, times)
        except RunError as error:
            told.append(str(error))
    proxy.disturb()
    assert told
    assert all("run the same command again" in text for text in told), told
    assert act(url) == expected


@strides(31)
def test_verifying_and_repairing_keep_sound_parts(url, proxy, stride):
    synthetic.fill(url, MANIFEST, lengths=LENGTHS)
    before = objects(url)
    for act in (
        lambda: [f for _, found in verify(TeacherStore(url)) for f in found],
        lambda: repair(TeacherStore(url)),
    ):
        total = requests_of(proxy, act)
        for n, fault, times in cases(total, stride):
            proxy.disturb(fault, n, times)
            try:
                found = act()
            except RunError:
                continue
            if isinstance(found, list):
                assert all(finding.unreadable for finding in found), (n, fault, times, found)
            else:
                assert found.dropped == [], (n, fault, times)
    proxy.disturb()
    assert objects(url) == before
