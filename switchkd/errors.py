"""Defines the errors that switchkd raises on purpose.

    SwitchKDError
    ├── InputError          the user's input cannot be used            exit code 2
    │   ├── DataError           data file, row or image
    │   ├── CheckpointError     model folder, or two incompatible models
    │   ├── ConfigError         option or recipe
    │   │   └── InUse               an output folder that another process writes into
    │   └── StoreError          teacher store
    │       └── StoreMismatch       store and run disagree: teacher, tokenizer, template, sample …
    ├── RunError            the run itself failed                      exit code 1
    │   ├── NonFiniteLogits     logits of which no loss can be computed
    │   └── ReadFailure         data that may be sound could not be read now
    │       └── StoreUnreadable     a teacher store, of which nothing says that it is damaged
    └── Stopped             a signal asked the run to end, and it did  exit code 143

A message states what was expected, what was found, and what to do next.
"""


class SwitchKDError(Exception):
    """Base of all switchkd errors; `exit_code` is the exit code of the command line."""

    exit_code = 1


class InputError(SwitchKDError, ValueError):
    """The user's input cannot be used; raised before any expensive work has started."""

    exit_code = 2


class DataError(InputError):
    """A data file, row or image cannot be used."""


class CheckpointError(InputError):
    """A model folder cannot be used, or two models are incompatible."""


class ConfigError(InputError):
    """An option or a recipe is wrong."""


class InUse(ConfigError):
    """An output folder belongs to a process that is still going."""


class StoreError(InputError):
    """A teacher store cannot be read or written."""


class StoreMismatch(StoreError):
    """A teacher store belongs to another teacher, tokenizer, template, data file or sample."""


class RunError(SwitchKDError, RuntimeError):
    """The run failed after it had started."""


class NonFiniteLogits(RunError, ValueError):
    """Logits contain NaN or +inf, so no loss can be computed."""


class ReadFailure(RunError):
    """Data could not be read for a reason that lies outside the data: permission, disk, network, memory.

    It says nothing about the data, so it stops the run and never becomes the status of a sample.
    """


class StoreUnreadable(ReadFailure):
    """A teacher store could not be read now: I/O error, permission, too many open files, no memory.

    Where StoreError says that something is damaged, and how to replace it, the advice here is to try again.
    """


class Stopped(SwitchKDError):
    """A scheduler's signal ended the run; what was done is saved, and the same command goes on."""

    exit_code = 143  # 128 + SIGTERM, the shell's convention


def original_message(error: BaseException) -> str:
    """Return the message of an error; for an error from a DataLoader worker, it is extracted from the traceback."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if "Original Traceback" in text else text
