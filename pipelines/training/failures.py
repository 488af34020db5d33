"""Errors that end a run early, reported in one form: what happened, the last good checkpoint, what to do."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed import DistError

from switchkd.errors import CheckpointError, DataError, RunError, StoreError, StoreMismatch, original_message
from switchkd.pipelines.training.lifecycle.sealed import last_checkpoint

FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_MEMORY = (
    "out of memory: lower --batch-size or --workers; there are also --student-checkpointing and --teacher-checkpointing"
)
log = logging.getLogger(__name__)


@contextmanager
def report_last_checkpoint(run: Path) -> Iterator[None]:
    """Add the last good checkpoint to the message of every error that can end training.

    Raises:
        StoreMismatch, DataError, CheckpointError: passed on, where a sample is not the one that was cached or checked, or where a
            tokenizer or image processor fails on it.
        RunError: the store or an image folder cannot be read any more, a disk or memory is full, a loader process or another
            process of the run has died, the loss is not finite.
    """
    try:
        yield
    except KeyboardInterrupt:
        log.warning("the last good checkpoint: %s", _last(run))
        raise
    except (StoreMismatch, DataError, CheckpointError) as error:
        raise type(error)(f"{original_message(error)}. {_advice(run)}") from error
    except RunError as error:
        raise RunError(f"{original_message(error)}\n{_advice(run)}") from error
    except SafetensorError as error:  # the error that safetensors raises for a full disk
        raise RunError(f"cannot write a checkpoint: {error}. Make room\n{_advice(run)}") from error
    except (StoreError, OSError) as error:
        room = ". Make room" if isinstance(error, OSError) and error.errno in FULL else ""
        raise RunError(f"the run cannot go on: {original_message(error)}{room}\n{_advice(run)}") from error
    except MemoryError as error:
        raise RunError(f"{_NO_MEMORY} ({original_message(error) or 'MemoryError'})\n{_advice(run)}") from error
    except DistError as error:
        raise RunError(f"lost another process of this run, see its own message: {error}\n{_advice(run)}") from error
    except RuntimeError as error:
        if (reason := _known(str(error))) is None:
            raise
        raise RunError(f"{reason}: {error}\n{_advice(run)}") from error


def _known(message: str) -> str | None:
    """Return what a RuntimeError of torch means, unless it is a bug of this package."""
    if "out of memory" in message or "can't allocate memory" in message:
        return _NO_MEMORY
    if "PytorchStreamWriter failed" in message or "enforce fail at inline_container" in message:  # DeepSpeed's files
        return "cannot write a checkpoint; make room"
    if "DataLoader worker" in message:
        return "a loader process died; the system kills the largest when memory runs out, so try fewer --workers"
    if any(word in message for word in ("closed by peer", "reset by peer", "gloo/transport")):  # gloo has no error type
        return "lost another process of this run, see its own message"
    return None


def _last(run: Path) -> str:
    return str(last_checkpoint(run) or "none yet")


def _advice(run: Path) -> str:
    return f"The last good checkpoint: {_last(run)}. The same command goes on from it"
