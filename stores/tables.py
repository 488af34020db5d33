"""Reads the tables that a store has once: token ids by frequency, and the steps of hidden states."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import RunError, StoreError
from switchkd.stores import layout
from switchkd.stores.checks import METADATA_BYTES, mapping, one_of, parse, whole
from switchkd.stores.chunk_codecs import CHAINS, ZSTD, check_chain, decode
from switchkd.stores.codec import HiddenSteps
from switchkd.stores.manifest import Manifest
from switchkd.stores.storage.base import Storage
from switchkd.stores.storage.failures import unreadable
from switchkd.stores.storage.paths import MARKER

_RECREATE = "it was damaged after writing: restore it, or delete the store and cache again"
_CHAINS = (*CHAINS, ("bytes", ZSTD), ("bytes", "crc32c"))


def read_rank_table(storage: Storage, manifest: Manifest) -> NDArray[np.uint32]:
    """Return id_of_rank [N]. Raises as `TeacherStore` does."""
    table = _read(storage, layout.ID_OF_RANK, np.dtype(np.uint32), manifest.vocab_rows)
    # A missing chunk means zeros.
    if table is None or not np.array_equal(np.sort(table), np.arange(manifest.vocab_rows)):
        raise StoreError(
            f"{storage.path}, array {layout.ID_OF_RANK}: not each of {manifest.vocab_rows} ids once; {_RECREATE}"
        )
    return table


def read_hidden_steps(storage: Storage, manifest: Manifest) -> HiddenSteps | None:
    """Return step and mean of every feature, [d] each; None for hidden states of another type. Raises as `TeacherStore` does."""
    if manifest.hidden_dtype != "steps":
        return None
    found = []
    for name, low in ((layout.STEP, 0.0), (layout.MEAN, -np.inf)):
        values = _read(storage, name, np.dtype(np.float32), manifest.hidden_width)
        # A missing chunk means NaN.
        if values is None or not (np.isfinite(values).all() and (values > low).all()):
            raise StoreError(
                f"{storage.path}, array {name}: not {manifest.hidden_width} finite float32 numbers"
                f"{' above 0' if low == 0 else ''}; {_RECREATE}"
            )
        found.append(values)
    return HiddenSteps(*found)


def _read(storage: Storage, name: str, dtype: np.dtype[Any], length: int) -> NDArray[Any] | None:
    """Return an array [length] of one chunk; None if it has another shape or type, or if its chunk does not exist."""
    try:
        about = mapping(parse(storage.read(f"{name}/{MARKER}", METADATA_BYTES)), "its zarr.json")
        shape = [whole(size, "shape", 0, 1 << 40) for size in about["shape"]]
        if shape != [length] or about["data_type"] != dtype.name:
            return None
        one_of(about["chunk_grid"]["configuration"]["chunk_shape"], "chunk_shape", (shape,))
        one_of(about["chunk_key_encoding"]["name"], "chunk_key_encoding", ("default",))
        chain = check_chain(about["codecs"], _CHAINS)
        try:
            chunk = storage.read(f"{name}/c/0", 2 * math.prod(shape) * dtype.itemsize + (1 << 14))
        except FileNotFoundError:
            return None
        return decode(chain, chunk, dtype, length)
    except (RunError, StoreError):
        raise
    except MemoryError as error:
        raise unreadable(storage.uri_of(name), error) from error
    # Codecs report damaged bytes by different exceptions, and nothing else can fail here.
    except Exception as error:
        raise StoreError(f"{storage.uri_of(name)}: {error}; {_RECREATE}") from error
