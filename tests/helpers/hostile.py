"""A small store to be made hostile, everything that reads one, and the assertion that reading is refused at once."""

import shutil
import time
import tracemalloc

import pytest
import synthetic
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import StoreError
from switchkd.stores import TeacherStore
from switchkd.stores.info import describe
from switchkd.stores.status import status
from switchkd.stores.verify import verify

MANIFEST = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8, samples=4, part_size=2)
MOST_BYTES = 128 << 20
MOST_SECONDS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("whole") / "s.zarr", MANIFEST, lengths=(3, 40))


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s.zarr")


def use(path):
    """Everything that reads a store."""
    store = TeacherStore(path)
    store.payload(list(range(len(store))))
    describe(path)
    status(path)
    return [finding.message for _, findings in verify(store) for finding in findings]


def refused(path, match=None):
    """Assert that reading is refused by a StoreError, in little time and memory; return its message."""
    begun = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match=match) as caught:
            use(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < MOST_SECONDS
    assert str(path) in str(caught.value)
    done = CliRunner().invoke(main, ["store", "info", str(path)])
    assert done.exit_code == 2 and not isinstance(done.exception, (TypeError, KeyError))
    return str(caught.value)
