"""The training objective L = CE + λ1·Align + λ2·VSD (paper, eq. 1) and its variants by name (Table 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from switchkd.errors import ConfigError
from switchkd.losses import bild_loss, dbild_loss, kl_loss
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


class LossParts(NamedTuple):
    """Sums over positions, nats; divide by the positions of the global batch. A part that is off is None."""

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

    Raises:
        ConfigError: unknown name, switch or window with an objective that has none, a temperature that is not positive.
    """

    name: str = "dbild-rkl"
    switch: bool = True
    align_weight: float = 1.0
    vsd_weight: float = 1.0
    temperature: float | None = None
    window: int | None = None

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

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but CE is computed."""
        return self.name != "sft"

    def distance(self, logits: Tensor, teacher: TeacherSignal) -> Tensor:
        """Return the named loss between `logits` [T, N] and the teacher, summed over positions."""
        loss = OBJECTIVES[self.name]
        assert loss is not None
        options: dict[str, float] = {}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.window is not None:
            options["window"] = self.window
        return loss(logits, teacher, reduction="sum", **options)

    def parts(
        self,
        student_logits: Tensor,
        targets: Tensor,
        teacher: TeacherSignal | None,
        switch: Tensor | None,
        on_image: Tensor,
    ) -> LossParts:
        """Compute CE, Align (eq. 4) and VSD (eq. 6), each summed over positions.

        CE runs over all V rows of the model; the distillation terms over the N rows in use.

        Args:
            student_logits: [P, V_S]. targets: [P] int64.
            teacher: signal over the same P positions and N ≤ V_S rows; None for "sft".
            switch: z_switch at the positions of image samples, [P_image, V_T]; None if there are none or VSD is off.
            on_image: [P] bool, which positions belong to image samples.
        """
        ce = F.cross_entropy(student_logits.float(), targets, reduction="sum")
        if not self.needs_teacher or teacher is None:
            return LossParts(ce, None, None)
        rows = teacher.vocab_rows
        align = self.distance(student_logits[:, :rows], teacher)
        vsd = None if switch is None else self.distance(switch[:, :rows], teacher.select(on_image))
        return LossParts(ce, align, vsd)

    def total(self, parts: LossParts) -> Tensor:
        """Weigh and add the parts: eq. 1."""
        total = parts.ce
        if parts.align is not None:
            total = total + self.align_weight * parts.align
        if parts.vsd is not None:
            total = total + self.vsd_weight * parts.vsd
        return total
