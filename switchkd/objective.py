"""The training objective L = CE + λ1·Align + λ2·VSD (paper, eq. 1) and its variants by name (Table 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from switchkd.errors import ConfigError
from switchkd.losses import bild_loss, dbild_loss, kl_loss
from switchkd.positions import count_positions, per_sample_weights
from switchkd.signals import TeacherSignal

_Distance = Callable[..., Tensor]

OBJECTIVES: dict[str, _Distance | None] = {
    "sft": None,
    "fkl": partial(kl_loss, direction="forward"),
    "rkl": partial(kl_loss, direction="reverse"),
    "bild-fkl": partial(bild_loss, divergence="forward_kl"),
    "bild-rkl": partial(bild_loss, divergence="reverse_kl"),
    "dbild-fkl": partial(dbild_loss, divergence="forward_kl"),
    "dbild-rkl": partial(dbild_loss, divergence="reverse_kl"),
}


MEANS = ("position", "sample")


class LossParts(NamedTuple):
    """Weighted sums over positions, nats; divide by what `Objective.mean` counts. A part that is off is None."""

    ce: Tensor
    align: Tensor | None
    vsd: Tensor | None


@dataclass(frozen=True)
class Objective:
    """What the student minimises.

    Args:
        name: one of `OBJECTIVES`; "sft" is CE alone.
        switch: whether VSD takes part (paper, Table 3).
        align_weight, vsd_weight: λ1, λ2.
        temperature: τ; None takes 3 for (D)BiLD, as the paper, and 1 for plain KL.
        window: restricts DBiLD's knee search, see `kneedle`; None is the paper.
        mean: "position" is the mean over all supervised positions of the global batch; "sample" takes each sample's mean over
            its positions first and then the mean over the samples of the global batch, so that long answers weigh no more.

    Raises:
        ConfigError: unknown name, switch or window with an objective that has none, a temperature that is not positive.
    """

    name: str = "dbild-rkl"
    switch: bool = True
    align_weight: float = 1.0
    vsd_weight: float = 1.0
    temperature: float | None = None
    window: int | None = None
    mean: str = "position"

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ConfigError(f"no objective {self.name!r}; there are {', '.join(OBJECTIVES)}")
        if self.name == "sft" and self.switch:
            raise ConfigError("objective sft has no teacher to switch to: pass --no-switch")
        if self.window is not None and not self.name.startswith("dbild"):
            raise ConfigError(f"a knee window belongs to dbild-fkl and dbild-rkl, not to {self.name}")
        if self.window is not None and self.window < 2:
            raise ConfigError(f"a knee window has at least 2 logits, got {self.window}")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"the temperature must be positive, got {self.temperature}")
        if self.mean not in MEANS:
            raise ConfigError(f"the mean is one over {'s or over '.join(MEANS)}s, got {self.mean!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but CE is computed."""
        return self.name != "sft"

    def count(self, labels: Tensor) -> Tensor:
        """Return how many things the mean runs over, positions or samples with a position: [B, L] labels → scalar int64."""
        positions = count_positions(labels)
        return positions.sum() if self.mean == "position" else (positions > 0).sum()

    def weights(self, labels: Tensor) -> Tensor | None:
        """Return the weight of each position, [P] float32; None where all weigh 1."""
        return None if self.mean == "position" else per_sample_weights(labels)

    def distance(self, logits: Tensor, teacher: TeacherSignal, weights: Tensor | None = None) -> Tensor:
        """Return the named loss between `logits` [T, N] and the teacher, summed over positions with `weights` [T]."""
        loss = OBJECTIVES[self.name]
        assert loss is not None
        options: dict[str, float] = {}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.window is not None:
            options["window"] = self.window
        return _weighted_sum(loss(logits, teacher, reduction="none", **options), weights)

    def parts(
        self,
        student_logits: Tensor,
        targets: Tensor,
        teacher: TeacherSignal | None,
        switch: Tensor | None,
        on_image: Tensor,
        weights: Tensor | None = None,
    ) -> LossParts:
        """Compute CE, Align (eq. 4) and VSD (eq. 6), each summed over positions.

        CE runs over all V rows of the model; the distillation terms over the N rows in use.

        Args:
            student_logits: [P, V_S]. targets: [P] int64.
            teacher: signal over the same P positions and N ≤ V_S rows; None for "sft".
            switch: z_switch at the positions of image samples, [P_image, V_T]; None if there are none or VSD is off.
            on_image: [P] bool, which positions belong to image samples.
            weights: [P], of each position; see `Objective.weights`. VSD's are those of image samples.
        """
        ce = _weighted_sum(F.cross_entropy(student_logits.float(), targets, reduction="none"), weights)
        if not self.needs_teacher or teacher is None:
            return LossParts(ce, None, None)
        rows = teacher.vocab_rows
        align = self.distance(student_logits[:, :rows], teacher, weights)
        vsd = None
        if switch is not None:
            on_image_weights = None if weights is None else weights[on_image]
            vsd = self.distance(switch[:, :rows], teacher.select(on_image), on_image_weights)
        return LossParts(ce, align, vsd)

    def total(self, parts: LossParts) -> Tensor:
        """Weigh and add the parts: eq. 1."""
        total = parts.ce
        if parts.align is not None:
            total = total + self.align_weight * parts.align
        if parts.vsd is not None:
            total = total + self.vsd_weight * parts.vsd
        return total


def _weighted_sum(per_position: Tensor, weights: Tensor | None) -> Tensor:
    return per_position.sum() if weights is None else (per_position * weights.to(per_position.dtype)).sum()
