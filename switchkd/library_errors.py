"""Converts what a library raises about a checkpoint's files to the errors of switchkd: one wrapper for each boundary.

transformers, tokenizers, safetensors and jinja document few of the exceptions that a damaged or odd file makes them raise (those in
Rust raise bare `Exception`, or a panic below `BaseException`). So everything that is not ours is the checkpoint's fault, except a
lack of memory and failures of the disk.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switchkd.errors import CheckpointError, ReadFailure, SwitchKDError
from switchkd.printable import printable

# Errors of the operating system that say something about the files, not about the machine.
_OF_THE_FILES = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL)


def is_library_failure(error: BaseException) -> bool:
    """Whether an error is neither ours, nor a lack of memory, nor a request to end."""
    if isinstance(error, SwitchKDError | MemoryError) or is_out_of_memory(error):
        return False
    return (
        isinstance(error, Exception) or type(error).__name__ == "PanicException"
    )  # Rust's, of tokenizers and safetensors


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError of torch says that the host's or the device's memory ran out."""
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))


def words_of(error: BaseException) -> str:
    """Return an error's message on one line, with its type where the message alone says little."""
    text = printable(" ".join(str(error).split()), 600)
    plain = isinstance(error, ValueError | OSError | RuntimeError) and len(text) > 15
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def as_checkpoint_error(
    folder: str | Path, doing: str = "cannot open checkpoint {}", advice: str = ""
) -> Iterator[None]:
    """Convert a library's errors about a folder's content to a CheckpointError that names the folder.

    Args:
        doing: what failed; {} stands for the folder. advice: what to do about it, to end the message.

    Raises:
        CheckpointError: the files cannot be used. ReadFailure: they could not be read now, and may be sound.
    """
    try:
        yield
    except BaseException as error:
        if not is_library_failure(error):
            raise
        said = f"{doing.format(printable(folder))}: {words_of(error)}"
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILES:
            raise ReadFailure(f"{said}; mend disk, network or permissions, and run the same command again") from error
        raise CheckpointError(said + (f"; {advice}" if advice else "")) from error
