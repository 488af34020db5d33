"""Where things lie inside a store, and how the unfinished folders of a writer are named."""

import os
import socket
from pathlib import Path

PARTS = "parts"
MARKER = "zarr.json"  # a part or a store on an object store is there if its own group's metadata are
WRITING = ".writing"  # unfinished parts; never read


def part_name(part: int) -> str:
    """Return the name of part number `part`, as it stands under `parts/`."""
    return f"{part:05d}"


def part_key(part: int) -> str:
    """Return where part number `part` lies inside a store."""
    return f"{PARTS}/{part_name(part)}"


def part_path(store: Path, part: int) -> Path:
    """Return the folder of part number `part`."""
    return store / PARTS / part_name(part)


def writer_prefix() -> str:
    """Return HOST-PROCESS of this process, the name of a writer and how its unfinished folders' begin."""
    return f"{host()}-{os.getpid()}"


def host() -> str:
    """Return this machine's name without the separator that names of unfinished folders use."""
    return socket.gethostname().replace("-", "_")
