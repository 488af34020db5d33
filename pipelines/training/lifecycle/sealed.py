"""Checkpoints on disk: committed by one rename, and checked by the digests that they record before anything is loaded.

A checkpoint is written into `RUN/.unfinished/checkpoint-N`. When all processes have written their files, one of them records the
size and the blake2b digest of each in `files.json`, syncs everything to disk and renames the folder to `RUN/checkpoint-N`. So a
checkpoint that has its final name was complete, and what differs from its digests has been damaged since.

Checkpoints of earlier versions have no `files.json`. They were written in place, with `trainer_state.json` last.
"""

import hashlib
import json
import logging
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from switchkd.errors import CheckpointError, ReadFailure
from switchkd.pipelines.run_folder import sync, sync_tree, write_atomically
from switchkd.pipelines.training.lifecycle.begun import checkpoints, step_of
from switchkd.pipelines.training.lifecycle.together import from_first_process

FILES = "files.json"  # name → [bytes, blake2b] of every other file
STATE = "trainer_state.json"  # every checkpoint has it
UNFINISHED = ".unfinished"  # below the run: what is being written or removed
THREADS = 4  # for digests: hashing does not hold Python's lock
READ_BYTES = 1 << 24
log = logging.getLogger(__name__)


def clear_unfinished(run: Path) -> None:
    """Remove what an interrupted run left unfinished; only the process that holds the run's lock calls it."""
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


def commit(run: Path, name: str, keep: int | None) -> None:
    """Make the written checkpoint `RUN/.unfinished/NAME` visible, and remove all but the `keep` newest (None: keep all).

    Raises:
        OSError: nothing has changed but what is in `.unfinished`.
    """
    written, target = run / UNFINISHED / name, run / name
    _seal(written)
    if target.exists():  # a damaged one that the run has gone past again
        _set_aside(target)
    written.rename(target)
    sync(run)
    if keep is not None:
        # One of a later step is damaged, since the run went on from an earlier one; it is replaced when its step comes.
        earlier = [path for path in checkpoints(run) if step_of(path) <= step_of(target)]
        for old in earlier[max(keep, 1) :]:
            _set_aside(old)
    clear_unfinished(run)


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda file: [file.stat().st_size, _digest(file)], files)
        names = [file.relative_to(folder).as_posix() for file in files]
        content = dict(zip(names, found, strict=True))
    write_atomically(folder / FILES, json.dumps(content, indent=1))
    sync_tree(folder)


def _set_aside(checkpoint: Path) -> None:
    """Make a checkpoint invisible by one rename; its files are deleted with the rest of `.unfinished`."""
    checkpoint.rename(checkpoint.parent / UNFINISHED / f"{checkpoint.name}-{uuid.uuid4().hex[:8]}")


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as content:
        while block := content.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def damage_of(checkpoint: Path, *, sealed: bool, digests: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is sound.

    Args:
        sealed: whether its run writes digests. If not, a checkpoint may lack them; then its files are only parsed.
        digests: whether to read the files; else only their sizes are compared.

    Raises:
        ReadFailure: a file could not be read now, which does not mean that it is damaged.
    """
    try:
        if (checkpoint / FILES).is_file():
            return _differing(checkpoint, digests)
        return f"{FILES} is missing" if sealed else _unreadable(checkpoint)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{error.filename} is missing"
    except (OSError, MemoryError) as error:
        raise ReadFailure(
            f"{checkpoint} could not be read: {error or type(error).__name__}. Nothing says that it is damaged: make it "
            "readable, and run the same command again"
        ) from error


def _differing(checkpoint: Path, digests: bool) -> str | None:
    listed = _listed(checkpoint)
    if listed is None:
        return f"{FILES} is damaged"
    for name, (size, _) in listed.items():
        file = checkpoint / name
        if not file.is_file():
            file.stat()  # a link or a folder that cannot be read is no missing file
            return f"{name} is no file"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, {size:,} were written"
    for file in checkpoint.rglob("*"):
        name = file.relative_to(checkpoint).as_posix()
        if file.suffix in {".json", ".safetensors"} and name != FILES and name not in listed:
            return f"{name} was not written with it"
    if digests:
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda name: _digest(checkpoint / name), listed)
            for (name, (_, digest)), here in zip(listed.items(), found, strict=True):
                if here != digest:
                    return f"{name} has other bytes than were written"
    return None


def _listed(checkpoint: Path) -> dict[str, tuple[int, str]] | None:
    """Read `files.json`; None if it is damaged."""
    try:
        content: Any = json.loads((checkpoint / FILES).read_bytes())
        listed = {str(name): (int(size), str(digest)) for name, (size, digest) in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    inside = all(name and not Path(name).is_absolute() and ".." not in Path(name).parts for name in listed)
    return listed if inside and STATE in listed else None


def _unreadable(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint without digests, as far as its files show it."""
    for file in [checkpoint / STATE, *sorted(checkpoint.rglob("*.json")), *sorted(checkpoint.rglob("*.safetensors"))]:
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            else:
                with safe_open(file, framework="pt"):  # compares the header with the file's size
                    pass
        except (ValueError, RecursionError, SafetensorError) as error:
            return f"{file.name} is incomplete or damaged: {error}"
    return None


def newest_sound(run: Path, *, sealed: bool) -> Path | None:
    """Return the newest checkpoint whose files are those that were written; None if the run has none yet.

    Damaged ones are passed over with a warning. All files of the returned one were read.

    Raises:
        CheckpointError: every checkpoint is damaged.
        ReadFailure: one could not be read.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints(run):
        damage = damage_of(checkpoint, sealed=sealed)
        if damage is None:
            if damaged:
                newest = step_of(next(iter(damaged)))
                log.warning(
                    "%s\nGoing on from %s: steps %d to %d are trained again",
                    _told(damaged), checkpoint, step_of(checkpoint) + 1, newest,
                )  # fmt: skip
            return checkpoint
        damaged[checkpoint] = damage
    if not damaged:
        return None
    if not sealed and len(damaged) == 1 and _never_finished(checkpoints(run)[0]):
        # An earlier version was killed while it wrote its first checkpoint in place.
        log.warning("%s\nBeginning at step 0", _told(damaged))
        return None
    raise CheckpointError(
        f"{run} has no sound checkpoint to go on from:\n{_told(damaged)}\n"
        "Restore one of them from a copy. Or remove them all, and the same command begins at step 0"
    )


def _never_finished(checkpoint: Path) -> bool:
    """Whether an earlier version did not write a checkpoint to its end: it wrote the state last."""
    try:
        json.loads((checkpoint / STATE).read_bytes())
    except (FileNotFoundError, ValueError):
        return not (checkpoint / FILES).exists()
    return False


def _told(damaged: dict[Path, str]) -> str:
    return "\n".join(f"{path} is damaged: {damage}" for path, damage in damaged.items())


def agree_on_checkpoint(run: Path, *, sealed: bool) -> Path | None:
    """Return `newest_sound`, found by the first process for all of them; every process of the run calls it.

    Raises:
        CheckpointError, ReadFailure: in the first process, see `newest_sound`.
        RunError: in the others, where the first one raised.
    """
    return from_first_process(lambda: newest_sound(run, sealed=sealed))


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint that is whole as far as sizes tell; None without one. Reads no tensors, raises nothing."""
    for checkpoint in checkpoints(run):
        try:
            if damage_of(checkpoint, sealed=False, digests=False) is None:
                return checkpoint
        except ReadFailure:
            continue
    return None
