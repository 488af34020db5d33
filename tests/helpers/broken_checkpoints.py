"""Checkpoints with one thing wrong, and what opening and using them must end in."""

import json
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

MOST_SECONDS = 20
MOST_BYTES = 512 << 20


def copy(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint, to be broken."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(checkpoint, folder))


def edit(folder: Path, file: str, **changed) -> Path:
    """Change keys of one of a checkpoint's JSON files; `section__key` is a key of a section; `...` removes it."""
    content = json.loads((folder / file).read_text())
    for name, value in changed.items():
        *sections, key = name.split("__")
        place = content
        for section in sections:
            place = place[section]
        if value is ...:
            place.pop(key, None)
        else:
            place[key] = value
    (folder / file).write_text(json.dumps(content))
    return folder


@contextmanager
def bounded():
    """Fail if the block takes long, or much memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    if (seconds := time.monotonic() - start) > MOST_SECONDS:
        pytest.fail(f"took {seconds:.0f} s")
    if (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10) > MOST_BYTES:
        pytest.fail(f"took {grown >> 20} MiB")
