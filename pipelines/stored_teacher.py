"""Reading a teacher store for training: encoding and checking samples as they were cached, and the signals of its payloads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchkd.data.encoded import EncodedSample
from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import template_from_dict
from switchkd.data.samples import SampleFile, Status
from switchkd.errors import StoreMismatch
from switchkd.fingerprints import SampleDigest
from switchkd.losses.lm_head import IDENTITY, LogitMap
from switchkd.losses.signals import HiddenSignal, MixedHiddenSignal, SparseSignal, TeacherSignal
from switchkd.models.checkpoint import (
    Checkpoint,
)
from switchkd.pipelines.batch import Batch
from switchkd.settings import TailPolicy
from switchkd.stores import Manifest, Payload, TeacherStore

# From docs/payloads-table.md, which a test compares.
WINDOW_GRADIENT_ERROR = "11 to 36 %"
TOPK_GRADIENT_ERROR = "27 to 45 %"


def topk_caution(manifest: Manifest, window: int | None = None) -> str | None:
    """Return what to know before DBiLD is computed from top-k logits; None where they hold all logits.

    Args:
        window: the objective's knee window; None at capture and for the paper's objective.
    """
    if manifest.top_k >= manifest.vocab_rows:
        return None
    if window is not None:
        return (
            f"payload topk keeps {manifest.top_k:,} of {manifest.vocab_rows:,} logits, and the ids that the student leads may lie "
            f"outside: of a real language model, the gradient of DBiLD with --window 128 differed by {WINDOW_GRADIENT_ERROR} from "
            "the live teacher's (docs/payloads.md)"
        )
    return (
        f"payload topk keeps {manifest.top_k:,} of {manifest.vocab_rows:,} logits, and full-vocabulary DBiLD reads more: of a real "
        f"language model, its gradient differed by {TOPK_GRADIENT_ERROR} from the live teacher's (docs/payloads.md)"
    )


class TeacherSource(Protocol):
    """Returns the teacher's signal at a batch's P positions."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the signal, on the device of `batch`."""
        ...

    def to(self, device: torch.device) -> None:
        """Move its tensors to a device."""
        ...


class StoredTopK:
    """Signals of payload `topk`: the k largest logits and the mass of the rest."""

    def __init__(self, vocab_rows: int, tail: TailPolicy) -> None:
        self.vocab_rows, self.tail = vocab_rows, tail

    def signal(self, batch: Batch) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        ids, logits, tail, knee = batch.teacher_ids, batch.teacher_logits, batch.teacher_tail, batch.teacher_knee
        assert ids is not None and logits is not None and tail is not None and knee is not None
        return SparseSignal(
            ids=ids,
            logits=logits,
            tail_logsumexp=tail,
            knee=knee,
            vocab_rows=self.vocab_rows,
            tail=self.tail,
        )

    def to(self, device: torch.device) -> None:
        """Does nothing: it has no tensors."""


class StoredHidden:
    """Signals of payload `hidden`: the teacher's LM head computes whole logit rows from stored states, about 1 % of a forward pass.

    Args:
        head: the LM head's weight, [V, d].
        exact_knee: whether the stored knees are those of the exact logits, see `Manifest.has_exact_knee`; else they are found again
            on the logits of the stored states.
        logit_map: what the teacher makes of its LM head's output.
    """

    def __init__(self, head: Tensor, vocab_rows: int, exact_knee: bool, logit_map: LogitMap = IDENTITY) -> None:
        self.head, self.exact_knee, self.logit_map = head[:vocab_rows], exact_knee, logit_map

    def signal(self, batch: Batch) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        assert batch.teacher_hidden is not None
        knee = batch.teacher_knee if self.exact_knee else None
        return HiddenSignal(batch.teacher_hidden, self.head, knee, self.logit_map)

    def to(self, device: torch.device) -> None:
        """Move the LM head."""
        self.head = self.head.to(device)


class StoredOfSeveral:
    """Signals of payload `hidden` from the stores of several teachers with one vocabulary; each position has its teacher's LM head.

    Args:
        sources: in the order of `Batch.teacher_number`; all with stored knees, or none.
    """

    def __init__(self, sources: Sequence[StoredHidden]) -> None:
        self.sources = list(sources)

    def signal(self, batch: Batch) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        assert batch.teacher_hidden is not None and batch.teacher_number is not None
        heads = tuple((source.head, source.logit_map) for source in self.sources)
        knee = batch.teacher_knee if all(source.exact_knee for source in self.sources) else None
        return MixedHiddenSignal(batch.teacher_hidden, heads, batch.teacher_number, knee)

    def to(self, device: torch.device) -> None:
        """Move the LM heads."""
        for source in self.sources:
            source.to(device)


def teacher_columns(payload: Payload) -> dict[str, torch.Tensor]:
    """Return a payload as the columns of a batch, see `Batch`; the large columns share its memory."""
    columns = {"teacher_knee": torch.from_numpy(payload.stat("knee")).long()}
    if payload.ids is not None and payload.logits is not None:
        columns["teacher_ids"] = torch.from_numpy(payload.ids).long()  # int64, as the losses index with it
        columns["teacher_logits"] = torch.from_numpy(payload.logits)
        columns["teacher_tail"] = torch.tensor(payload.stat("tail_logsumexp"))
    if payload.hidden is not None:
        columns["teacher_hidden"] = torch.from_numpy(payload.hidden)
    if payload.visual_advantage is not None:
        columns["teacher_visual_advantage"] = torch.from_numpy(payload.visual_advantage)
    return columns


def encoder_of_store(
    manifest: Manifest, checkpoint: Checkpoint, images: Path | None, longer: int = 0, with_starts: bool = False
) -> SampleEncoder:
    """Return an encoder with the settings of a store: its template and its limits.

    Args:
        checkpoint: the model that reads the samples, with the requested image mode; see `Manifest.image_mode`.
        images: the image folder. longer: tokens allowed in addition to the store's maximum length.
        with_starts: see `SampleEncoder`.

    Raises:
        DataError: the image folder does not exist.
        CheckpointError: the image token is not in the vocabulary.
    """
    template = template_from_dict(manifest.template)
    length = manifest.max_length + longer
    return SampleEncoder(checkpoint, template, images, length, manifest.max_image_pixels, with_starts)


def choose_samples(store: TeacherStore, count: int, seed: int) -> list[int]:
    """Return at most `count` random usable samples of the existing parts, in ascending order."""
    usable = np.concatenate(
        [
            np.flatnonzero(store.part_statuses(part) == Status.OK) + store.manifest.part_samples(part)[0]
            for part in store.parts()
        ]
        or [np.empty(0, np.int64)]
    )
    count = min(count, len(usable))
    return sorted(np.random.default_rng(seed).choice(usable, count, replace=False).tolist())


def encode_as_cached(encoder: SampleEncoder, samples: SampleFile, store: TeacherStore, index: int) -> EncodedSample:
    """Encode a sample. Raises StoreMismatch if it is not the one that was cached."""
    encoded = encoder.encode(samples[index])
    if changed := encoded.digest.differing(SampleDigest(*store.digest(index))):
        raise StoreMismatch(f"row {index}: its {changed_since(changed, store)}")
    return encoded


def changed_since(changed: Sequence[str], store: TeacherStore) -> str:
    """Return what changed about a sample since a store was made, in words, and what else may be the reason.

    Args:
        changed: see `SampleDigest.differing`.
    """
    otherwise = ""
    if "image" in changed:
        written_by = store.manifest.written_by.get("switchkd", "an unknown version")
        otherwise = (
            f" (the file's bytes, or the way of decoding it: images that are rotated, transparent or of 16 bits have other pixels "
            f"than before switchkd turned, filled and scaled them; the store was written by {written_by})"
        )
    return f"{' and '.join(changed)} changed since {store.path} was made{otherwise}"
