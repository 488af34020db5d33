"""Metrics between two logs of a run: work done, time waited, knees, and the switch pathway's gradient at the tower's output."""

import time
from typing import Any

import torch
from torch import Tensor

from switchkd.losses.selection import kneedle
from switchkd.losses.signals import TeacherSignal
from switchkd.models.families import family_of
from switchkd.models.features import Features
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.training.cost_model import CostModel, Work, patches_of
from switchkd.positions import count_positions

KNEE_POSITIONS = 32  # positions of a batch whose knees are measured, in steps that are logged


class StepMetrics:
    """Counts in this process; `take` adds them up over all processes and resets them.

    Args:
        cost_model: computes FLOPs; None leaves them out.
        window: of the knee search, see `kneedle`; knees are measured only with an objective that uses them.
        knees: whether the objective uses knees.
        in_blocks: whether student and switch teacher attend within samples only, see `block_attention`.
    """

    def __init__(
        self,
        cost_model: CostModel | None,
        *,
        knees: bool,
        window: int | None,
        in_blocks: tuple[bool, bool] = (False, False),
    ) -> None:
        self.cost_model, self.knees, self.window, self.in_blocks = cost_model, knees, window, in_blocks
        self.looking = False  # whether this step will be logged
        self._start_over()
        self._since = 0.0  # the clock starts at the first step

    def _start_over(self) -> None:
        self._since = time.perf_counter()
        self._waited = self._store = self._samples = self._tokens = self._pairs = 0.0
        self._images = self._image_tokens = self._image_pairs = 0.0
        # Tokens without padding, positions, positions with an image, pairs of tokens of a sample: student's and switch pathway's;
        # patches, their pairs, and image tokens, where they depend on the image; image tokens, and those on the switch pathway.
        self._on_device: Tensor | None = None
        self._knees: dict[str, list[Tensor]] = {"teacher": [], "student": []}
        self._vsd_square: Tensor | None = None

    def step_begins(self, looking: bool, waited: float, batches: list[Batch]) -> None:
        """Record a step whose micro-batches took `waited` seconds to load, and whether it will be logged."""
        self.looking, self._vsd_square = looking, None
        self._since = self._since or time.perf_counter() - waited
        self._waited += waited
        self._store += sum(batch.store_seconds for batch in batches)

    def unlogged(self) -> "StepMetrics":
        """Return metrics for batches that do not belong to the run: they measure nothing that is costly, and nobody takes them."""
        return StepMetrics(None, knees=False, window=None)

    def pause(self, seconds: float) -> None:
        """Leave out time in which something else than training ran."""
        if self._since:  # the clock has started
            self._since += seconds

    def count(self, batch: Batch) -> None:
        """Count one micro-batch before it enters the model."""
        read = batch.teacher_inputs
        rows, length = (batch.input_ids if batch.packing is None else batch.packing).shape
        images = 0 if batch.pixel_values is None else len(batch.pixel_values)
        self._samples += len(batch.input_ids)
        self._tokens += rows * length
        self._pairs += rows * length**2
        self._images += images
        if batch.switch_packing is None:
            rows, length = int(batch.on_switch.sum()), read.input_ids.shape[1]
        else:
            rows, length = batch.switch_packing.shape
        self._image_tokens += rows * length
        self._image_pairs += rows * length**2
        positions = count_positions(batch.labels)
        lengths = batch.attention_mask.sum(-1)
        read_lengths = read.attention_mask.sum(-1)
        shown = batch.on_switch
        counts = lengths, positions, positions[shown], lengths**2, read_lengths[shown] ** 2
        sums = [*(count.sum() for count in counts), *self._vision(batch), *self._switched(batch)]
        found = torch.stack(sums).double()
        self._on_device = found if self._on_device is None else self._on_device + found

    def _vision(self, batch: Batch) -> list[Tensor]:
        """Return patches, their pairs and image tokens of a batch; zeros where they follow from the number of images."""
        config = None if self.cost_model is None else self.cost_model.student.config
        if config is None or family_of(config).is_llava or not batch.media:
            return [batch.input_ids.new_zeros(())] * 3
        return [*patches_of(config, batch.media), (batch.input_ids == config.image_token_id).sum()]

    def _switched(self, batch: Batch) -> list[Tensor]:
        """Return the image tokens of a batch, and those of samples on the switch pathway."""
        if self.cost_model is None:
            return [batch.input_ids.new_zeros(())] * 2
        tokens = (batch.input_ids == self.cost_model.student.config.image_token_id).sum(-1)
        return [tokens.sum(), (tokens * batch.on_switch).sum()]

    def work(self) -> Work:
        """Return the work that this process has counted since the last call of `take`."""
        on_device = torch.zeros(10) if self._on_device is None else self._on_device
        _, positions, shown, own_pairs, own_image_pairs, patches, patch_pairs, placeholders, shown_tokens, switched = (
            on_device.tolist()
        )
        return Work(
            self._tokens,
            own_pairs if self.in_blocks[0] else self._pairs,
            self._images,
            self._image_tokens,
            own_image_pairs if self.in_blocks[1] else self._image_pairs,
            positions,
            shown,
            patches,
            patch_pairs,
            placeholders,
            switched / shown_tokens if shown_tokens else 1.0,
        )

    def leave_out(self, images: int, length: int, known: int) -> None:
        """Subtract from the switch pathway's counts the tokens that did not run: the first `known` of `length` of each row."""
        self._image_tokens -= images * known
        self._image_pairs -= images * known * length

    @torch.no_grad()
    def record_knees(self, logits: Tensor, teacher: TeacherSignal | None) -> None:
        """Measure the knees of some positions, in a step that will be logged: student logits [c, V], the teacher's signal."""
        if not (self.knees and self.looking) or teacher is None:
            return
        room = KNEE_POSITIONS - sum(map(len, self._knees["student"]))
        if room > 0 and len(logits):
            some = torch.arange(len(logits), device=logits.device) < room
            mine, word = logits.detach()[some, : teacher.vocab_rows], teacher.select(some)
            _, of_teacher = word.leading_ids(word.rows(mine), self.window)
            self._knees["student"].append(kneedle(mine, self.window))
            self._knees["teacher"].append(of_teacher)

    def watched(self, features: Features) -> Features:
        """Return the features for the teacher's projector, and measure the gradient that the switch pathway passes back to them.

        They are views, whose gradient is that of VSD alone, or of switch-ce's second CE; the student reads the features themselves.
        The cost is one norm.
        """
        if not self.looking:
            return features
        seen = {cut: value.view_as(value) for cut, value in features.items()}
        for value in seen.values():
            if value.requires_grad:
                value.register_hook(self._add_square)  # type: ignore[no-untyped-call]
        return seen

    def _add_square(self, gradient: Tensor) -> None:
        square = gradient.detach().float().square().sum().double()
        self._vsd_square = square if self._vsd_square is None else self._vsd_square + square

    def take(self, accelerator: Any, gradient_scale: float, peak_flops: float | None) -> dict[str, float]:
        """Return the metrics since the last call, over all processes; every process calls it.

        Args:
            gradient_scale: the factor on the loss that compensates for averaging over processes.
            peak_flops: of one device, per second; None leaves MFU out.
        """
        seconds = time.perf_counter() - self._since
        device = accelerator.device
        on_device = torch.zeros(10, dtype=torch.float64) if self._on_device is None else self._on_device
        square = torch.zeros((), dtype=torch.float64) if self._vsd_square is None else self._vsd_square
        plain = [self._samples, self._tokens, self._pairs, self._images, self._image_tokens, self._image_pairs]
        sums = [
            torch.tensor([*plain, self._waited, self._store, 1.0], dtype=torch.float64),
            on_device,
            square.reshape(1),
        ]
        reduced = accelerator.reduce(torch.cat([s.to(device) for s in sums]), reduction="sum").tolist()
        (
            samples,
            tokens,
            pairs,
            images,
            image_tokens,
            image_pairs,
            waited,
            store,
            processes,
            real,
            positions,
            shown,
            own_pairs,
            own_image_pairs,
            patches,
            patch_pairs,
            placeholders,
            shown_tokens,
            switched,
            square_sum,
        ) = reduced
        pairs = own_pairs if self.in_blocks[0] else pairs
        image_pairs = own_image_pairs if self.in_blocks[1] else image_pairs
        found = {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "tokens_per_second": real / seconds,
            "positions_per_second": positions / seconds,
            "padding_share": 1 - real / max(tokens, 1),
            "wait_seconds": waited / processes,
            "wait_share": waited / processes / seconds,
            "store_read_seconds": store / processes,
        }
        if self.cost_model is not None:
            in_text = tokens, pairs, images, image_tokens, image_pairs, positions, shown
            work = Work(*in_text, patches, patch_pairs, placeholders, switched / shown_tokens if shown_tokens else 1.0)
            per_second = self.cost_model.flops(work) / seconds
            found["tflops_per_second"] = per_second / 1e12
            if peak_flops is not None:
                found["mfu"] = per_second / peak_flops / processes
        if square_sum:
            found["vsd_gradient_norm"] = square_sum**0.5 / gradient_scale
        found |= self._knee_figures(accelerator)
        self._start_over()
        return found

    def _knee_figures(self, accelerator: Any) -> dict[str, float]:
        if not self.knees:
            return {}
        found = {}
        for who, knees in self._knees.items():
            room = torch.full((KNEE_POSITIONS,), torch.nan, dtype=torch.float64)
            here = torch.cat(knees)[:KNEE_POSITIONS].double().cpu() if knees else room[:0]
            room[: len(here)] = here
            every = accelerator.gather(room.to(accelerator.device))
            every = every[~every.isnan()]
            if len(every):
                found[f"knee_{who}_mean"] = float(every.mean())
                found[f"knee_{who}_p95"] = float(every.quantile(0.95))
        return found
