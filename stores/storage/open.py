"""Selects the storage for a path or URL."""

import re
from pathlib import Path

from switchkd.errors import StoreError
from switchkd.settings import StoreLocation
from switchkd.stores.storage.base import Storage
from switchkd.stores.storage.local import LocalStorage


def open_storage(path: StoreLocation) -> Storage:
    """Return the storage that a path or URL names; nothing is opened.

    Raises:
        StoreError: the URL's kind of storage is not supported, or the extra `s3` is not installed.
    """
    if "://" in str(path):
        from switchkd.stores.storage.object_store import ObjectStorage

        return ObjectStorage(str(path))
    if re.match(r"(s3a?|gs|az|abfss?):/", str(path)):
        raise StoreError(f"{path} was a URL and lost a slash as a Path: give it as text")
    return LocalStorage(Path(path))
