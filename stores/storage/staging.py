"""Unfinished folders of writers: written, checked, synced to disk and renamed; those of dead writers are removed.

A folder's name says who writes it: HOST-BOOT-NAMESPACE-PROCESS. A process number means something only together with the running
kernel (BOOT) and the PID namespace: two containers on one host may have the same host name, and each has a process 1.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Files


def unfinished_name(name: str = "") -> str:
    """Return a new name of an unfinished folder of this process."""
    return "-".join(filter(None, (*machine(), str(os.getpid()), name, uuid.uuid4().hex[:8])))


@cache
def machine() -> tuple[str, str, str]:
    """Return host, boot and PID namespace of this process; "0" where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")[:12]
    except OSError:
        boot = ""
    try:
        namespace = "".join(filter(str.isdecimal, os.readlink("/proc/self/ns/pid")))
    except OSError:
        namespace = ""
    return paths.host(), boot or "0", namespace or "0"


@contextmanager
def staged(place: Path, prefix: str, files: Files, name: str = "") -> Iterator[Path]:
    """Write files to an unfinished folder in `place`; delete what is left at the end."""
    folder = place / f"{prefix}{unfinished_name(name)}"
    try:
        place.mkdir(exist_ok=True)  # programs that copy stores may leave out the empty `.writing`
        os.mkdir(folder)
        # The folder is made once and not with each file: if it is moved away, writing must fail and not begin a second one.
        for inner in sorted({str(parent) for key in files for parent in Path(key).parents} - {"."}):
            os.mkdir(folder / inner)
        for key, data in files.items():
            _write(folder / key, data)
        yield folder
    finally:
        delete(folder)


def commit(folder: Path, target: Path, files: Files) -> bool:
    """Sync a folder to disk and rename it to `target`; return False if the target already exists.

    Raises:
        OSError: also if the folder no longer has all of the given files in full.
    """
    for key, data in files.items():
        if (size := os.stat(folder / key).st_size) != len(data):
            raise OSError(f"{folder / key} has {size} bytes after {len(data)} were written")
    _sync_folder(folder)
    committed = True
    try:
        os.rename(folder, target)
    except OSError:
        # A rename cannot replace a folder that is not empty, so if it exists, another writer was first.
        if not _is_there(target):
            raise
        committed = False
    _sync(target.parent)
    return committed


def delete(folder: Path) -> None:
    """Delete a folder, or a link to one; what cannot be deleted is left to a later writer."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(place: Path, prefix: str) -> None:
    """Delete the unfinished folders in `place` that dead processes of this boot and PID namespace created.

    A folder is renamed first. Should its writer live after all, it then fails, instead of committing a part without its files.
    """
    begin = f"{prefix}{'-'.join(machine())}-"
    try:
        names = [name for name in os.listdir(place) if name.startswith(begin)]
    except (OSError, MemoryError):  # no such folder, or it cannot be listed now: a later writer removes them
        return
    for name in names:
        process = name.removeprefix(begin).split("-")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            moved = place / f"{prefix}{unfinished_name('dropped')}"
            try:
                os.rename(place / name, moved)
            except OSError:  # another writer removes it
                continue
            delete(moved)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's files and folders to disk, so that after a crash a renamed folder is never incomplete."""
    for path, _, files in os.walk(folder, onerror=_raise):
        for name in files:
            _sync(Path(path, name))
        _sync(Path(path))


def _raise(error: OSError) -> None:
    raise error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
