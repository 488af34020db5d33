"""By how much a model looks: the log-probability that an answer gains when the image is sharp instead of blurred.

The visual advantage of a token y is log p(y | image, text before it) − log p(y | blurred image, text before it), as VA-OPD
(arXiv 2605.21924) defines it for a teacher; here it is summed over the supervised tokens of a sample, in nats. A model that does
not look, or that is shown other images than those the answers are about, has an advantage of about 0.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchkd.counting import counted
from switchkd.data.encoded import EncodedSample, collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import Sample
from switchkd.losses.lm_head import LMHead
from switchkd.losses.signals import HiddenSignal, SparseSignal
from switchkd.models.vlm import states_at_positions
from switchkd.positions import targets

BLUR = 1 / 16  # standard deviation of the Gaussian, as a share of the image's longer side
NORMAL_95 = 1.6449  # one-sided 95 % point of the normal distribution
FEWEST = 16  # fewer samples, of all kinds or of one, are reported and not judged
LEAST_EXPLAINED = 0.9  # of the variance; rounding and batches leave less than 0.01, a tenth of the rows astray some 0.2
NO_KIND = "other"
CHUNK_POSITIONS = 512  # whose logits are computed at a time


@dataclass(frozen=True)
class Advantage:
    """The visual advantage of one kind of sample, in nats a sample."""

    samples: int
    sharp: float  # mean log p(answer | image)
    blurred: float  # mean log p(answer | blurred image)
    error: float  # standard error of the mean advantage; 0 for one sample
    positive: float  # share of the samples whose answer gains

    @property
    def mean(self) -> float:
        """The mean advantage."""
        return self.sharp - self.blurred

    @property
    def is_clear(self) -> bool:
        """Whether more than chance speaks for a gain: its mean, or its sign where a few samples gain very much.

        Both tests are one-sided at 5 %, by the normal approximation; the sign test has the continuity correction.
        """
        surplus = self.positive * self.samples - self.samples / 2 - 0.5
        by_sign = surplus > NORMAL_95 * np.sqrt(self.samples) / 2
        return self.mean > 0 and (self.mean > NORMAL_95 * self.error or bool(by_sign))

    @classmethod
    def of(cls, sharp: NDArray[np.float64], blurred: NDArray[np.float64]) -> "Advantage":
        """Summarise log-probabilities of n samples, [n] each, nats."""
        gain = sharp - blurred
        error = float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else 0.0
        return cls(len(gain), float(sharp.mean()), float(blurred.mean()), error, float((gain > 0).mean()))


@dataclass(frozen=True)
class VisualAdvantage:
    """The visual advantage of a model over samples with an image."""

    every: Advantage | None  # None without a sample that has an image
    by_kind: Mapping[str, Advantage]
    stored: Advantage | None = None  # of a store's logits in place of the model's at sharp images
    stored_error: float | None = None  # mean distance of a store's visual advantages, in nats a position
    explained: float = 1.0  # share of the variance of the model's own that those of the store explain (R²)

    @property
    def warnings(self) -> list[str]:
        """What is wrong, each a sentence; none if the model looks, or if too few samples tell."""
        if self.every is None or self.every.samples < FEWEST:
            return []
        if not self.every.is_clear:
            return [
                f"the teacher does not look: a sharp image instead of a blurred one adds {self.every.mean:.3f} ± "
                f"{self.every.error:.3f} nats to an answer's log-probability, over "
                f"{counted(self.every.samples, 'sample')}. Perhaps images "
                "belong to other rows, the template leaves them out, or the model answers from the text: compare with "
                "`switchkd data show` and `switchkd chat`"
            ]
        found = []
        if self.stored is not None and not self.stored.is_clear:
            found.append(
                f"the images of this capture went astray: the live teacher gains {self.every.mean:.3f} nats an answer from a sharp "
                f"image, what is stored {self.stored.mean:.3f}. Cache again"
            )
        if self.stored_error is not None and self.explained < LEAST_EXPLAINED:
            found.append(
                f"the visual advantages that the store holds are {self.stored_error:.3f} nats a position from the live "
                f"teacher's, and explain {max(self.explained, 0.0):.0%} of their variance: some belong to other images. Cache "
                "again, or train without --weight-by visual-advantage"
            )
        blind = [kind for kind, one in self.by_kind.items() if one.samples >= FEWEST and not one.is_clear]
        if blind and len(self.by_kind) > 1:
            found.append(f"the teacher does not look where it answers questions of these kinds: {', '.join(blind)}")
        return found


def blurred_encoder(encoder: SampleEncoder) -> SampleEncoder:
    """Return an encoder that blurs every image, and is else the same: texts, numbers of tokens and digests do not change."""
    other = copy(encoder)  # with an empty cache of images
    other.blur = BLUR
    return other


class SharpAndBlurred:
    """Encodes samples with their images, and these blurred, too, as `EncodedSample.blurred`; errors are those of `encode`."""

    def __init__(self, encoder: SampleEncoder) -> None:
        self.sharp, self.soft = encoder, blurred_encoder(encoder)

    def __call__(self, sample: Sample) -> EncodedSample:
        encoded = self.sharp.encode(sample)
        return replace(encoded, blurred=self.soft.encode(sample).media) if encoded.media is not None else encoded


@torch.no_grad()
def advantages(model: Any, head: LMHead, samples: Sequence[EncodedSample], states: Tensor, pad_id: int) -> Tensor:
    """Return log p(y | image, text before) − log p(y | blurred image, text before) of every supervised token y (VA-OPD, eq. 2).

    The paper takes 0 for a negative difference; here it keeps its sign, which does not change the order of positive ones.

    Args:
        model: the teacher, on any device; it runs over the blurred images. head: its LM head, over the rows in use.
        samples: with `blurred` where they have an image.
        states: the teacher's final states at all P positions of the samples, with their sharp images, [P, d].

    Returns:
        [P] float64 on the CPU, nats; 0 at the positions of samples without an image.
    """
    counts = torch.tensor([sample.positions for sample in samples])
    on_image = torch.tensor([sample.media is not None for sample in samples]).repeat_interleave(counts)
    found = torch.zeros(len(states), dtype=torch.float64)
    if not on_image.any():
        return found
    soft = collate([replace(one, media=one.blurred) for one in samples if one.media is not None], pad_id)
    wanted = targets(soft["labels"])
    sharp = log_probs_of_states(states[on_image.to(states.device)], head, wanted)
    found[on_image] = sharp - log_probs_of_states(states_at_positions(model, soft), head, wanted)
    return found


@dataclass(frozen=True)
class Measured:
    """Log-probabilities of the supervised tokens of samples with an image, before they are summarised."""

    kinds: list[str]  # of the samples; "" where the data file names none
    positions: list[int]  # of the samples
    sharp: Tensor  # [P] float64, nats
    blurred: Tensor  # [P] float64, nats


@torch.no_grad()
def measure(
    model: Any, head: LMHead, encoder: SampleEncoder, samples: Sequence[Sample], pad_id: int, batch_size: int
) -> Measured:
    """Run a model twice over the samples that have an image, once with the image blurred.

    Args:
        model: a VLM, on any device. head: its LM head, over the rows in use. samples: usable ones.

    Raises:
        BadSample, ReadFailure: see `SampleEncoder.encode`.
    """
    shown, found = [sample for sample in samples if sample.images], []
    for encode in (encoder.encode, blurred_encoder(encoder).encode):
        parts = [torch.zeros(0, dtype=torch.float64)]
        for start in range(0, len(shown), batch_size):
            batch = collate([encode(sample) for sample in shown[start : start + batch_size]], pad_id)
            parts.append(log_probs_of_states(states_at_positions(model, batch), head, targets(batch["labels"])))
        found.append(torch.cat(parts))
    positions = [encoder.encode(sample, pixels=False).positions for sample in shown]
    return Measured([sample.question_type for sample in shown], positions, *found)


def log_probs_of_states(states: Tensor, head: LMHead, wanted: Tensor) -> Tensor:
    """Return log p of the tokens `wanted` [P] under logits of `states` [P, d]: [P] float64 on the CPU, nats."""
    found = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(states), CHUNK_POSITIONS):
        rows = slice(start, start + CHUNK_POSITIONS)
        logits = head.logits(states[rows]).double()
        at = wanted[rows].to(logits.device)
        found.append((logits.gather(-1, at[:, None]).squeeze(-1) - logits.logsumexp(-1)).cpu())
    return torch.cat(found)


def log_probs_of_signal(signal: HiddenSignal | SparseSignal, wanted: Tensor) -> Tensor:
    """Return log p of the tokens `wanted` [P] by a store's signal, [P] float64, nats; NaN where its logit is not kept."""
    if isinstance(signal, HiddenSignal):
        return log_probs_of_states(signal.hidden, LMHead(signal.head, logit_map=signal.logit_map), wanted)
    wanted = wanted.to(signal.ids.device)
    at = signal.ids == wanted[:, None]
    logits = signal.logits.double()
    total = torch.logaddexp(logits.logsumexp(-1), signal.tail_logsumexp.double())
    kept = torch.where(at, logits, 0.0).sum(-1) - total
    return torch.where(at.any(-1), kept, torch.nan).cpu()


def summarise(
    measured: Measured, stored: Tensor | None = None, advantages_of_store: Tensor | None = None
) -> VisualAdvantage:
    """Summarise log-probabilities by sample and kind.

    Args:
        stored: log p by a store's signal at the same positions, [P]; a sample with a NaN is left out of `stored`.
        advantages_of_store: the visual advantages that a store holds at the same positions, [P] nats.
    """
    if not measured.kinds:
        return VisualAdvantage(None, {})
    sharp, blurred = (_of_samples(values, measured.positions) for values in (measured.sharp, measured.blurred))
    members: dict[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(measured.kinds):
        members[kind or NO_KIND].append(index)
    by_kind = {kind: Advantage.of(sharp[at], blurred[at]) for kind, at in sorted(members.items())}
    of_store = None
    if stored is not None:
        kept = _of_samples(stored, measured.positions)
        known = ~np.isnan(kept)
        of_store = Advantage.of(kept[known], blurred[known]) if known.any() else None
    every, gain = Advantage.of(sharp, blurred), measured.sharp - measured.blurred
    if advantages_of_store is None or not len(gain):
        return VisualAdvantage(every, by_kind, of_store)
    error = advantages_of_store - gain
    left, total = float(error.square().sum()), float((gain - gain.mean()).square().sum())
    explained = 1 - left / total if total else float(left == 0)
    return VisualAdvantage(every, by_kind, of_store, float(error.abs().mean()), explained)


def _of_samples(values: Tensor, positions: Sequence[int]) -> NDArray[np.float64]:
    """Add up the values of each sample: [P] → [samples]."""
    return np.array([float(part.sum()) for part in values.split(list(positions))])


def lines_of(found: VisualAdvantage) -> list[str]:
    """Return the report as lines of text, warnings last."""
    if found.every is None:
        return ["visual advantage: no sample has an image"]
    head = (
        f"{'kind':<24}{'samples':>8}{'log p, image':>14}{'blurred':>10}{'advantage':>11}{'± error':>9}{'positive':>10}"
    )
    out = ["visual advantage: log p(answer | image) - log p(answer | blurred image), nats a sample", head]
    rows = dict(found.by_kind) if len(found.by_kind) > 1 else {}
    rows |= {"all": found.every}
    if found.stored is not None:
        rows["all, as stored"] = found.stored
    for name, one in rows.items():
        out.append(
            f"{name[:23]:<24}{one.samples:>8,}{one.sharp:>14.3f}{one.blurred:>10.3f}{one.mean:>+11.3f}{one.error:>9.3f}"
            f"{one.positive:>10.0%}"
        )
    if found.stored_error is not None:
        out.append(
            f"the store's visual advantages are {found.stored_error:.4f} nats a position from these, and explain "
            f"{max(found.explained, 0.0):.2%} of their variance"
        )
    return out + [f"warning: {text}" for text in found.warnings]
