"""Every error that switchkd raises on purpose.

    SwitchKDError
    ├── InputError          what the user gave cannot be used          exit code 2
    │   ├── DataError           data file, row or image
    │   ├── CheckpointError     model folder, or two models that do not fit
    │   ├── ConfigError         option or recipe
    │   └── StoreError          teacher store
    │       └── StoreMismatch       store and run disagree: teacher, tokenizer, template, sample …
    └── RunError            the run itself failed                      exit code 1
        └── NonFiniteLogits     logits that no loss can be taken of

A message says what was expected, what was found, and what to do next.
"""


class SwitchKDError(Exception):
    """Base of all switchkd errors; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(SwitchKDError, ValueError):
    """Something the user gave cannot be used; nothing expensive has started."""

    exit_code = 2


class DataError(InputError):
    """A data file, row or image cannot be used."""


class CheckpointError(InputError):
    """A model folder cannot be used, or two models do not fit each other."""


class ConfigError(InputError):
    """An option or a recipe is wrong."""


class StoreError(InputError):
    """A teacher store cannot be read or written."""


class StoreMismatch(StoreError):
    """A teacher store belongs to another teacher, tokenizer, template, data file or sample."""


class RunError(SwitchKDError, RuntimeError):
    """The run failed after it had started."""


class NonFiniteLogits(RunError, ValueError):
    """Logits hold NaN or +inf, so no loss can be taken of them."""


def original_message(error: BaseException) -> str:
    """Return the message of an error; one that a DataLoader worker raised comes wrapped in its traceback."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if "Original Traceback" in text else text
