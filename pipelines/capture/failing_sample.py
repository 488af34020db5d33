"""Names the row of a sample at which the teacher fails: the one wrapper around what a backend's model raises."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from switchkd.data.encoded import EncodedSample
from switchkd.errors import RunError
from switchkd.library_errors import is_library_failure, words_of
from switchkd.pipelines.capture.backends.base import Backend, BackendFailed
from switchkd.stores import Manifest, Payload


@contextmanager
def naming_failing_sample(
    backend: Backend, manifest: Manifest, teacher: Path, batch: Sequence[tuple[int, EncodedSample]]
) -> Iterator[None]:
    """If the capture of a batch fails inside the block, run its samples one by one, and name the row that fails.

    Args:
        teacher: the checkpoint's folder, for the error. batch: (row, sample) of those that are captured.

    Raises:
        RunError: names the row, or all rows of the batch if each alone succeeds. BackendFailed, a lack of memory: passed on.
    """
    try:
        yield
    except BackendFailed:
        raise
    except BaseException as failure:
        if not (isinstance(failure, RunError) or is_library_failure(failure)):
            raise
        for row, sample in batch:
            try:
                backend.capture([sample], manifest)
            except BaseException as error:
                if isinstance(error, RunError):
                    raise RunError(f"row {row}: {error}; nothing of its part was stored") from failure
                if not is_library_failure(error):
                    raise
                raise RunError(
                    f"row {row}: the model of {teacher} fails on it: {words_of(error)}; nothing of its part was stored. Leave out "
                    "the row, or compare the checkpoint's config.json with its weights and tokenizer"
                ) from failure
        rows = ", ".join(str(row) for row, _ in batch)
        raise RunError(
            f"the model of {teacher} fails on the batch of rows {rows}, though not on each alone: {words_of(failure)}; lower "
            "--batch-size"
        ) from failure


def capture_rows(
    backend: Backend, manifest: Manifest, teacher: Path, batch: Sequence[tuple[int, EncodedSample]]
) -> list[Payload]:
    """Capture (row, sample) pairs in one batch; see `naming_failing_sample`."""
    with naming_failing_sample(backend, manifest, teacher, batch):
        return backend.capture([sample for _, sample in batch], manifest)
