"""The training objective L = CE + λ1·Align + λ2·VSD (paper, eq. 1) and its variants by name (Table 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switchkd.losses.baselines import BASELINES
from switchkd.losses.dbild import Divergence, bild_loss, dbild_loss
from switchkd.losses.fused import Block, SwitchStates, loss_in_chunks
from switchkd.losses.kl import kl_loss
from switchkd.losses.lm_head import LMHead
from switchkd.losses.reduction import at_least_float32
from switchkd.losses.signals import TeacherSignal
from switchkd.losses.visual_weights import visual_weights
from switchkd.positions import count_positions, per_sample_weights
from switchkd.settings import WeightBy, check_objective

_Divergence = Callable[..., Tensor]

OBJECTIVES: dict[str, _Divergence | None] = {
    "sft": None,
    "fkl": partial(kl_loss, direction="forward"),
    "rkl": partial(kl_loss, direction="reverse"),
    "bild-fkl": partial(bild_loss, divergence="forward_kl"),
    "bild-rkl": partial(bild_loss, divergence="reverse_kl"),
    "dbild-fkl": partial(dbild_loss, divergence="forward_kl"),
    "dbild-rkl": partial(dbild_loss, divergence="reverse_kl"),
    "switch-ce": None,
    # Align of the baselines; their additional terms are in `baselines`.
    **dict.fromkeys(BASELINES, partial(kl_loss, direction="forward")),
}


class LossTerms(NamedTuple):
    """Weighted sums over positions, nats; divide by `Objective.count` for the mean. A term that is off is None."""

    ce: Tensor
    align: Tensor | None
    vsd: Tensor | None  # with "switch-ce", the cross-entropy on the switch pathway


class FusedLoss(NamedTuple):
    """The total that is minimised, with graph, and its terms, without graph; sums over positions, nats."""

    total: Tensor
    terms: LossTerms


@dataclass(frozen=True)
class Objective:
    """The loss that the student minimises, as a weighted sum of terms.

    Args:
        name: one of `OBJECTIVES`; "sft" is CE alone. "switch-ce" is CE + λ2·CE(L_T(P_T(V_S(x))), y), the cross-entropy of the true
            answers y on the switch pathway (eq. 5) at the positions of image samples, in place of VSD, and no Align. It reads no
            logit of the teacher: the control that tells what its frozen projector and LLM do from what its output does.
        switch: whether VSD is one of the terms (paper, Table 3).
        align_weight, vsd_weight: λ1, λ2; λ2 is also the weight of the cross-entropy on the switch pathway.
        temperature: τ; None selects 3 for (D)BiLD, as in the paper, and 1 for plain KL.
        window: restricts DBiLD's knee search, see `kneedle`; None is the paper's setting.
        normalize_by: "position" is the mean over all supervised positions of the global batch; "sample" takes each sample's mean
            over its positions first and then the mean over the samples of the global batch, so that long answers weigh no more.
        weight_by: "visual-advantage" weights the positions of Align and VSD within each sample, see `losses.visual_weights`; CE is
            an ordinary mean. None weights none.

    Raises:
        ConfigError: unknown name, `switch` or `window` set for an objective without it, a temperature that is not positive.
    """

    name: str = "dbild-rkl"
    switch: bool = True
    align_weight: float = 1.0
    vsd_weight: float = 1.0
    temperature: float | None = None
    window: int | None = None
    normalize_by: str = "position"
    weight_by: WeightBy | None = None

    def __post_init__(self) -> None:
        check_objective(self.name, self.switch, self.temperature, self.window, self.normalize_by, self.weight_by)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term other than CE is computed, so that a teacher is required."""
        return self.name != "sft"

    @property
    def needs_signal(self) -> bool:
        """Whether any term compares with the teacher's logits, so that a store or a live teacher is required."""
        return OBJECTIVES[self.name] is not None

    @property
    def term_names(self) -> tuple[str, str, str]:
        """Names of the three `LossTerms` in the log."""
        return ("ce", "align", "switch_ce" if self.name == "switch-ce" else "vsd")

    @property
    def baseline(self) -> bool:
        """Whether this is the objective of a baseline, with terms on visual tokens or attention; see `baselines.BASELINES`."""
        return self.name in BASELINES

    def count(self, labels: Tensor) -> Tensor:
        """Return the denominator of the mean, positions or samples with a position: [B, L] labels → scalar int64."""
        positions = count_positions(labels)
        return positions.sum() if self.normalize_by == "position" else (positions > 0).sum()

    def weights(self, labels: Tensor) -> Tensor | None:
        """Return the weight of each position, [P] float32; None if all weights are 1."""
        return None if self.normalize_by == "position" else per_sample_weights(labels)

    def distil_weights(self, labels: Tensor, advantage: Tensor | None) -> Tensor | None:
        """Return the weight of each position in Align and VSD, [P] float32; None if it is that of `weights`.

        Args:
            labels: [B, L]. advantage: the teacher's visual advantage at the P positions, [P]; needed with `weight_by`.
        """
        if self.weight_by is None:
            return None
        assert advantage is not None
        within, of_sample = visual_weights(advantage, labels), self.weights(labels)
        return within if of_sample is None else within * of_sample

    def divergence(self, logits: Tensor, teacher: TeacherSignal, weights: Tensor | None = None) -> Tensor:
        """Return the named loss between `logits` [T, N] and the teacher, summed over positions with `weights` [T]."""
        loss = OBJECTIVES[self.name]
        assert loss is not None
        options: dict[str, float] = {}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.window is not None:
            options["window"] = self.window
        return _weighted_sum(loss(logits, teacher, reduction="none", **options), weights)

    def terms(
        self,
        student_logits: Tensor,
        targets: Tensor,
        teacher: TeacherSignal | None,
        switch: Tensor | None,
        on_image: Tensor,
        weights: Tensor | None = None,
        distil_weights: Tensor | None = None,
    ) -> LossTerms:
        """Compute CE, Align (eq. 4) and VSD (eq. 6), each summed over positions.

        CE runs over all V rows of the model; the distillation terms over the N rows in use.

        Args:
            student_logits: [P, V_S]. targets: [P] int64.
            teacher: signal over the same P positions and N ≤ V_S rows; None for an objective without `needs_signal`.
            switch: z_switch at the positions of image samples, [P_image, V_T]; None if there are none or VSD is off.
            on_image: [P] bool, which positions belong to image samples.
            weights: [P], of each position; see `Objective.weights`. VSD uses those of image samples.
            distil_weights: [P], of Align and VSD; see `Objective.distil_weights`. None: those of CE.
        """
        ce = _cross_entropy(student_logits, targets, weights)
        if self.name == "switch-ce" and switch is not None:
            of_images = None if weights is None else weights[on_image]
            return LossTerms(ce, None, _cross_entropy(switch, targets[on_image], of_images))
        if not self.needs_signal or teacher is None:
            return LossTerms(ce, None, None)
        rows = teacher.vocab_rows
        weights = weights if distil_weights is None else distil_weights
        align = self.divergence(student_logits[:, :rows], teacher, weights)
        vsd = None
        if switch is not None:
            if (
                torch.compiler.is_compiling()
            ):  # a mask selects a data-dependent number of positions, which cannot be compiled
                on_image = torch.nonzero_static(on_image, size=switch.shape[0]).squeeze(-1)
            on_image_weights = None if weights is None else weights[on_image]
            vsd = self.divergence(switch[:, :rows], teacher.select(on_image), on_image_weights)
        return LossTerms(ce, align, vsd)

    def total(self, terms: LossTerms) -> Tensor:
        """Return the weighted sum of the terms: eq. 1."""
        total = terms.ce
        if terms.align is not None:
            total = total + self.align_weight * terms.align
        if terms.vsd is not None:
            total = total + self.vsd_weight * terms.vsd
        return total

    def fused(
        self,
        hidden: Tensor,
        head: LMHead,
        targets: Tensor,
        teacher: TeacherSignal | None,
        switch: SwitchStates | None = None,
        weights: Tensor | None = None,
        chunk_positions: int | None = None,
        on_block: Callable[[Tensor, TeacherSignal | None], None] | None = None,
        distil_weights: Tensor | None = None,
    ) -> FusedLoss:
        """Compute `total(terms(…))` from hidden states; the logits of one chunk at most are in memory at a time.

        The student's LM head runs once for all three terms. Align and VSD share each chunk of the teacher's logits, its order and
        its knee. Memory and dtypes: see `fused.loss_in_chunks`.

        Args:
            hidden: the student's final hidden states at the P positions, [P, d]. head: its LM head.
            targets: [P] int64. teacher: see `terms`.
            switch: the switch pathway at the same P positions; None if there is no image or VSD is off.
            weights, distil_weights: [P], see `terms`.
            chunk_positions: maximum number of positions per chunk.
            on_block: called with each block's student logits and the teacher's signal at its positions, to compute metrics
                beside the loss.

        Raises:
            ValueError: see `fused.loss_in_chunks`.
        """

        def open_chunk(rows: slice) -> Callable[[Block], tuple[Tensor, Tensor]]:
            signal = None if teacher is None else teacher.slice_rows(rows)
            return partial(loss_of_block, signal)

        def loss_of_block(signal: TeacherSignal | None, block: Block) -> tuple[Tensor, Tensor]:
            rows = block.rows
            none = targets.new_zeros(len(block.logits), dtype=torch.bool)
            keep = none if switch is None else switch.on_image[rows]
            weight, distil = (None if each is None else each[rows] for each in (weights, distil_weights))
            here = None if signal is None else signal.slice_rows(block.in_chunk)
            if on_block is not None:
                on_block(block.logits.detach(), here)
            terms = self.terms(block.logits, targets[rows], here, block.switch, keep, weight, distil)
            if terms.vsd is not None and switch is not None:
                terms = terms._replace(vsd=terms.vsd * switch.scale)
            return self.total(terms), torch.stack([terms.ce.new_zeros(()) if term is None else term for term in terms])

        total, sums = loss_in_chunks(hidden, head, open_chunk, switch=switch, chunk_positions=chunk_positions)
        ce, align, vsd = sums if len(sums) else total.detach().expand(3)
        there = self.needs_signal and teacher is not None
        return FusedLoss(total, LossTerms(ce, align if there else None, None if switch is None else vsd))


def _weighted_sum(per_position: Tensor, weights: Tensor | None) -> Tensor:
    return per_position.sum() if weights is None else (per_position * weights.to(per_position.dtype)).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum of cross-entropies over positions, in float32 at least: [P, V], [P] → scalar, nats."""
    return _weighted_sum(F.cross_entropy(at_least_float32(logits), targets, reduction="none"), weights)


def fused_dbild(
    student_hidden: Tensor,
    student_head: LMHead,
    targets: Tensor,
    teacher: TeacherSignal,
    *,
    switch_hidden: Tensor | None = None,
    switch_head: LMHead | None = None,
    on_image: Tensor | None = None,
    temperature: float = 3.0,
    divergence: Divergence = "reverse_kl",
    window: int | None = None,
    align_weight: float = 1.0,
    vsd_weight: float = 1.0,
    chunk_positions: int | None = None,
    distil_weights: Tensor | None = None,
) -> FusedLoss:
    """CE + λ1·Align + λ2·VSD with DBiLD (eq. 1) from hidden states and LM heads, without [P, V] logits.

    The result equals that of `dbild_loss` on whole logits. The gradient is computed together with the value, so backward can run
    only once.

    Args:
        student_hidden, student_head, targets, teacher, chunk_positions, distil_weights: see `Objective.fused`.
        switch_hidden, switch_head, on_image: see `fused.SwitchStates`; all three or none. Without `switch_hidden` there is no VSD.
        temperature, window, align_weight, vsd_weight: see `Objective`. divergence: see `dbild_loss`.

    Returns:
        (total, terms), sums over positions, nats; divide by their number for a mean.

    Raises:
        ConfigError: a temperature that is not positive, a window below 2.
        ValueError: the switch pathway's arguments do not go together, or an unknown divergence.
    """
    names = {"reverse_kl": "dbild-rkl", "forward_kl": "dbild-fkl"}
    if divergence not in names:
        raise ValueError(f"divergence must be 'reverse_kl' or 'forward_kl', got {divergence!r}")
    name, has_switch = names[divergence], switch_hidden is not None
    objective = Objective(name, has_switch, align_weight, vsd_weight, temperature, window)
    switch = None
    if switch_hidden is not None:
        if switch_head is None or on_image is None:
            raise ValueError("switch_hidden comes with switch_head and on_image")
        switch = SwitchStates(switch_hidden, switch_head, on_image)
    return objective.fused(
        student_hidden,
        student_head,
        targets,
        teacher,
        switch,
        chunk_positions=chunk_positions,
        distil_weights=distil_weights,
    )
