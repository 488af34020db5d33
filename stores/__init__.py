"""The teacher store: what a teacher said about every supervised position of a data file, on disk. Format: README.md."""

from switchkd.stores.manifest import Manifest
from switchkd.stores.payload import Payload
from switchkd.stores.reader import StoredSample, TeacherStore
from switchkd.stores.writer import PartArrays, StoreWriter

__all__ = ["Manifest", "PartArrays", "Payload", "StoreWriter", "StoredSample", "TeacherStore"]
