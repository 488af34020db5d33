"""Defines the paths inside a store and the names of writers' unfinished folders."""

import os
import socket
from pathlib import Path

PARTS = "parts"
MARKER = "zarr.json"  # on an object store, a part or a store exists if the metadata of its own group exist
WRITING = ".writing"  # unfinished parts; never read


def part_name(part: int) -> str:
    """Return the name of part number `part`, as used under `parts/`."""
    return f"{part:05d}"


def part_key(part: int) -> str:
    """Return the key of part number `part` inside a store."""
    return f"{PARTS}/{part_name(part)}"


def part_path(store: Path, part: int) -> Path:
    """Return the folder of part number `part`."""
    return store / PARTS / part_name(part)


def writer_prefix() -> str:
    """Return HOST-PROCESS of this process: the name of the writer in the parts that it commits."""
    return f"{host()}-{os.getpid()}"


def host() -> str:
    """Return this machine's name without the separator that names of unfinished folders use."""
    return socket.gethostname().replace("-", "_")
