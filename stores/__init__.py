"""The teacher store: the teacher's signal at every position of a data file, on disk or an object store. Format: README.md."""

from switchkd.stores.manifest import Manifest
from switchkd.stores.payload import Payload
from switchkd.stores.reader import TeacherStore
from switchkd.stores.stored_sample import StoredSample
from switchkd.stores.writer import PartArrays, StoreTables, StoreWriter

__all__ = ["Manifest", "PartArrays", "Payload", "StoreTables", "StoreWriter", "StoredSample", "TeacherStore"]
