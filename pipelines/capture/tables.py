"""The tables of a new store, made from a probe of its first samples and from the teacher's LM head."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchkd.counting import counted
from switchkd.data.encoded import EncodedSample
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, SampleFile
from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.vlm import load_lm_head
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.failing_sample import capture_rows
from switchkd.stores import Manifest, Payload, StoreTables
from switchkd.stores.codec import HiddenSteps, ranks_by_frequency, steps_of
from switchkd.waits import Waiting

PROBE_SAMPLES = 64  # the first usable samples: their top-k ids give the rank table, their states the mean
log = logging.getLogger(__name__)
_HEAD_ROWS = 1 << 14  # of the LM head that are raised to float64 at a time


def probe_tables(
    backend: Backend,
    checkpoint: Checkpoint,
    encoder: SampleEncoder,
    samples: SampleFile,
    manifest: Manifest,
    batch_size: int,
) -> StoreTables:
    """Capture the first usable samples, and return the tables of a store of this manifest.

    Raises:
        RunError: the teacher fails on a sample, or gave logits that are not finite.
        CheckpointError: see `head_spread` and `tables_of`.
    """
    log.info("running the teacher over the first samples, for the tables of the store")
    encoded: list[tuple[int, EncodedSample]] = []
    for sample in samples if manifest.has_topk or manifest.hidden_dtype == "steps" else ():
        try:
            encoded.append((sample.index, encoder.encode(sample)))
        except BadSample:
            continue
        if len(encoded) == PROBE_SAMPLES:
            break
    probe: list[Payload] = []
    sharp = replace(manifest, visual_advantage=0.0)  # the tables do not depend on it
    with Waiting(f"running the teacher over the first {counted(len(encoded), 'sample')}") as wait:
        for start in range(0, len(encoded), batch_size):
            probe += capture_rows(backend, sharp, checkpoint.path, encoded[start : start + batch_size])
            wait.share = min(1.0, (start + batch_size) / len(encoded))
    return tables_of(probe, manifest, head_spread(checkpoint, manifest) if manifest.hidden_dtype == "steps" else None)


def head_spread(checkpoint: Checkpoint, manifest: Manifest) -> NDArray[np.float64]:
    """Return the spread of each column of the teacher's LM head over the rows in use, [d]; see `column_spread`.

    Raises:
        CheckpointError: no LM head.
    """
    return column_spread(load_lm_head(checkpoint, manifest.teacher["dtype"])[: manifest.vocab_rows])


def tables_of(probe: Sequence[Payload], manifest: Manifest, spread: NDArray[np.float64] | None) -> StoreTables:
    """Return the tables of a store of this manifest.

    * The vocabulary, ordered by how often each id is among the top k of the probe. The order affects the size of ranks alone.
    * For hidden states as steps: the step of each feature from the LM head (`codec.steps_of`), and the mean of the probe's states,
      0 if it has none. The mean affects the size alone.

    Args:
        spread: see `head_spread`; needed for steps.

    Raises:
        CheckpointError: a spread from which no steps can be computed.
    """
    known = [payload.ids.ravel() for payload in probe if payload.ids is not None]
    id_of_rank = ranks_by_frequency(np.concatenate([np.empty(0, np.int32), *known]), manifest.vocab_rows)
    if manifest.hidden_dtype != "steps":
        return StoreTables(id_of_rank)
    assert spread is not None
    try:
        step = steps_of(spread, manifest.hidden_error)
    except ValueError as error:
        raise CheckpointError(f"the teacher's hidden states cannot be stored as steps: {error}") from None
    # Whole steps, so that rounding in the teacher's forward pass does not move it from one machine to the next.
    mean = np.rint(_mean(probe, manifest.hidden_width) / step) * step
    return StoreTables(id_of_rank, HiddenSteps(step, mean))


def column_spread(head: Tensor) -> NDArray[np.float64]:
    """Return the population standard deviation of each column of an LM head, [N, d] → [d], computed in float64."""
    total, squares = (torch.zeros(head.shape[1], dtype=torch.float64) for _ in range(2))
    mean = head[:_HEAD_ROWS].double().mean(0)  # near the mean, so that nothing cancels below
    for rows in torch.split(head, _HEAD_ROWS):
        away = rows.double() - mean
        total += away.sum(0)
        squares += away.square().sum(0)
    variance = squares / len(head) - (total / len(head)).square()
    spread: NDArray[np.float64] = variance.clamp_min(0).sqrt().numpy()
    return spread


def _mean(probe: Iterable[Payload], width: int) -> NDArray[np.float32]:
    states = [payload.hidden for payload in probe if payload.hidden is not None and len(payload)]
    if not states:
        return np.zeros(width, np.float32)
    mean: NDArray[np.float32] = np.concatenate(states).mean(0, dtype=np.float64).astype(np.float32)
    return mean
