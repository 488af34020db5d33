"""Python's collector of circular references, turned off where it only costs time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection(lasting: bool = False) -> Iterator[None]:
    """Turn the collector off while very many objects are made that stay, as in the import of torch or of a large vocabulary.

    Their number makes it run again and again over all objects that there are: a fifth of the import of torch and transformers.

    Args:
        lasting: whether the collector leaves out, from then on, all objects that there are at the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if lasting:
            gc.freeze()
        if enabled:
            gc.enable()
