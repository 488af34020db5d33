"""The trainer: transformers' Trainer with the objective of eq. 1 and an exact resume."""

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from switchkd.errors import RunError
from switchkd.losses.baselines import Seen
from switchkd.losses.cross_tokenizer import VocabMap, loss_over_vocabularies
from switchkd.losses.fused import SwitchStates
from switchkd.losses.objective import FusedLoss, LossTerms, Objective
from switchkd.models.block_attention import uses_block_attention
from switchkd.models.components import language_model_of, lm_head_of, replace_lm_head
from switchkd.models.features import (
    Features,
    capture_features,
    image_outputs,
    media_for,
    output_tensors,
    text_arguments,
)
from switchkd.models.packing import into_rows
from switchkd.models.prefix_cache import SharedPrefixCache
from switchkd.models.switch import of_samples, switch_states
from switchkd.models.switch_adapter import adapt
from switchkd.models.vlm import blank_media
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.preflight.left_out import LeftOut
from switchkd.pipelines.stored_teacher import TeacherSource
from switchkd.pipelines.training.batches.sampler import StepBatches
from switchkd.pipelines.training.cost_model import CostModel
from switchkd.pipelines.training.held_out.best import BestStudent
from switchkd.pipelines.training.held_out.evaluating_trainer import EvaluatingTrainer
from switchkd.pipelines.training.held_out.evaluator import Evaluator
from switchkd.pipelines.training.lifecycle.stopping import RunLoader
from switchkd.pipelines.training.live.extra_terms import ExtraTerms
from switchkd.pipelines.training.metrics import StepMetrics
from switchkd.pipelines.training.step_ways.experimental import compilations
from switchkd.pipelines.training.student_parts import set_part_rates
from switchkd.pipelines.training.trainer_hooks import CheckpointHooks
from switchkd.positions import count_positions, predicting_rows, targets, teacher_weights

NO_DISTANCE = 1e-6  # nats per position; a VSD that is mathematically 0 is at most this large after rounding
log = logging.getLogger(__name__)


class SwitchTrainer(EvaluatingTrainer, CheckpointHooks):
    """Minimises CE + λ1·Align + λ2·VSD; each the objective's mean over the global batch (all devices and micro-batches).

    Args:
        objective: what is minimised.
        part_rates: peak learning rates of parts of the student that have their own, see `stages.set_part_rates`.
        source: of the teacher's signal for Align and VSD; None for an objective that reads none.
        teacher: frozen, for the switch pathway; None if VSD is off.
        sample_media: of any image, as the student's processor makes it, for text-only batches; a Llava takes a blank image.
        extra_terms: what a baseline's objective adds to CE and Align.
        vocab_map: for a teacher with another tokenizer; its source must provide whole rows of logits.
        group_by: which samples share a batch, see `EpochOrder`.
        cost_model: computes the FLOPs of a step; None leaves them out of the log.
        peak_tflops: of one device, for MFU.
        vsd_share: the share of the image samples that pass the switch pathway, see `SwitchShare`.
        half_copies: the student computes with bfloat16 copies of its weights, see `half_copies.HalfCopies`.
        compiled: the layers are compiled, see `experimental.compile_layers`; the log counts what was.
        left_out: counts the samples that turn out to be unusable; None where a store knows them all.
        evaluator: of held-out samples; None without. best: keeps the best student by them.
        arguments: those of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        source: TeacherSource | None,
        teacher: Any | None,
        sample_media: dict[str, Tensor] | None = None,
        extra_terms: ExtraTerms | None = None,
        vocab_map: VocabMap | None = None,
        part_rates: dict[str, float] | None = None,
        group_by: str = "none",
        cost_model: CostModel | None = None,
        peak_tflops: float | None = None,
        left_out: LeftOut | None = None,
        vsd_share: float = 1.0,
        half_copies: bool = False,
        compiled: bool = False,
        evaluator: Evaluator | None = None,
        best: BestStudent | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.left_out, self.evaluator, self.best = left_out, evaluator, best
        self.objective, self.peak_tflops = objective, peak_tflops
        self.meter = StepMetrics(
            cost_model,
            knees=objective.name.startswith("dbild"),
            window=objective.window,
            in_blocks=(
                uses_block_attention(language_model_of(self.model)),
                teacher is not None and uses_block_attention(language_model_of(teacher)),
            ),
        )
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        # All processes gather sharded layers together, and their known prefixes may differ in length.
        self.prefix_cache = None if self.args.fsdp else SharedPrefixCache()
        self.source, self.extra_terms, self.sample_media = source, extra_terms, sample_media
        self.vocab_map = None if vocab_map is None else vocab_map.to(self.args.device)
        self.group_by, self.vsd_share = group_by, vsd_share
        if source is not None:
            source.to(self.args.device)
        self.part_rates = part_rates or {}
        self.uses_half_copies, self.compiled = half_copies, compiled
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the count of the whole accumulated batch
        self._logged = torch.zeros(
            len(objective.term_names) + 2, dtype=torch.float64
        )  # sums since the last log; their count; positions

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load the micro-batches of this process; `StepBatches` divides the samples, so accelerate must not divide them again."""
        args, dataset = self.args, self.train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        batches = StepBatches(
            dataset.order(self.group_by, seed, per_step),
            steps=args.max_steps,
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            process=args.process_index,
            processes=args.world_size,
        )
        return RunLoader(
            dataset,
            args,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; on CPUs accelerate would replicate models although sharding was requested."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.accelerator.is_fsdp2:
            self.is_fsdp_enabled = True
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch: a sum over its positions, divided by the count of the global batch."""
        batch = Batch.of(inputs)
        self.meter.count(batch)
        total, terms = self.loss_terms(model, batch)
        count = self.objective.count(batch.labels)
        self._record(terms, count, count_positions(batch.labels).sum())
        if batch.pixel_values is None or self._leaves_out_adapter(batch):
            total = total + 0.0 * self._idle_vision(model)
        if num_items_in_batch is None:
            return total / count.clamp_min(1)
        return total * self._averaged / num_items_in_batch

    def _leaves_out_adapter(self, batch: Batch) -> bool:
        """Whether a switch adapter would be without a gradient, since no sample of the batch passes the switch pathway."""
        student = self.accelerator.unwrap_model(self.model)
        return hasattr(student, "switch_adapter") and batch.switched is not None and not bool(batch.switched.any())

    @property
    def _averaged(self) -> int:
        """The factor on a loss: processes average gradients, while each loss is divided by the count over all processes."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of one step and the divisor of the objective's mean; the Trainer counts positions only."""
        asked = time.perf_counter()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step + 1
        logged = step % self.state.logging_steps == 0 or step == self.state.max_steps
        waited, read = time.perf_counter() - asked, [Batch.of(columns) for columns in batches]
        self.meter.step_begins(logged, waited, read)
        if self.left_out is not None:
            self.left_out.meet(one for batch in read for one in batch.left_out)
        if self.objective.normalize_by != "position" and count is not None:
            count = self._over_processes(torch.stack([self.objective.count(batch.labels) for batch in read]), device)
        if self.extra_terms is not None:
            images = torch.stack([batch.has_image.sum() for batch in read])
            self.extra_terms.begin_step(count, self._over_processes(images, device))
        # Every sample of a step may turn out to be unusable; its loss is then 0.
        return batches, count.clamp_min(1) if isinstance(count, Tensor) else count

    def _over_processes(self, counts: Tensor, device: torch.device) -> Tensor:
        """Add up the counts of the micro-batches [n] of a step, of all processes where losses are averaged over them."""
        here = counts.sum().to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            here = self.accelerator.gather(here).sum()
        return here

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer, with a learning rate of its own for each part that has one."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.part_rates:
            set_part_rates(optimizer, self.model if model is None else model, self.part_rates)
        return optimizer

    def loss_terms(self, model: nn.Module, batch: Batch) -> FusedLoss:
        """Run the student, the switch pathway and the objective over one batch; see `Objective.fused`.

        The total includes the extra terms. All of it is computed inside the student's forward, in place of its LM head.
        """
        student = self.accelerator.unwrap_model(model)
        rows = predicting_rows(batch.labels)
        source, extra, media = batch.packing, self.extra_terms, media_for(student, batch.media)
        kept = rows if extra is None else extra.kept_rows(student, batch, rows)
        found: list[LossTerms] = []

        def loss_of_states(states: Tensor) -> Tensor:  # [kept, d]
            own = states if extra is None else states[rows[kept]]
            total, terms = self._loss_of_states(student, own, features, batch, rows)
            found.append(terms)
            return total if extra is None else extra.add_to(total, student, batch, states, kept, seen)

        with (
            capture_features(student) as features,
            nullcontext(Seen()) if extra is None else extra.watch(student) as seen,
            replace_lm_head(student, loss_of_states),
        ):
            total = model(
                **text_arguments(student, batch.input_ids, batch.attention_mask, batch.labels, media, source),
                **media,
                # Samples come row by row, so positions are in the same order in rows and one sample a line.
                logits_to_keep=kept if source is None else into_rows(kept, source),
                use_cache=False,
            ).logits
        return FusedLoss(total, found[0])

    def _loss_of_states(
        self, student: Any, states: Tensor, features: Features, batch: Batch, rows: Tensor
    ) -> FusedLoss:
        """The objective at the student's final hidden states, [P, d]; `features` holds V_S(x) if there is an image."""
        head = lm_head_of(student)
        switch = None
        if self.objective.switch and features and (batch.switched is None or bool(batch.switched.any())):
            switch = self._switch_states(adapt(student, features), batch)
        weights = self.objective.weights(batch.labels)
        if self.vocab_map is not None:
            assert self.source is not None and batch.partner is not None and batch.teacher_labels is not None
            return loss_over_vocabularies(
                self.objective,
                self.vocab_map,
                states,
                head,
                targets(batch.labels),
                self.source.signal(batch),
                batch.partner,
                switch,
                weights=weights,
                switch_weights=teacher_weights(batch.labels, batch.teacher_labels, weights),
            )
        return self.objective.fused(
            states,
            head,
            targets(batch.labels),
            None if self.source is None else self.source.signal(batch),
            switch,
            weights=weights,
            on_block=self.meter.record_knees,
            distil_weights=self.objective.distil_weights(batch.labels, batch.teacher_visual_advantage),
        )

    def _switch_states(self, features: Features, batch: Batch) -> SwitchStates:
        """Run the switch pathway on those samples of a batch that pass it; `features` of all its images."""
        assert self.teacher is not None
        on, read = batch.on_switch, batch.teacher_inputs
        if batch.switched is not None:
            features = {cut: of_samples(on, value, read.input_ids, self.teacher) for cut, value in features.items()}
        read_rows = predicting_rows(read.labels)
        through = switch_states(
            self.teacher,
            self.meter.watched(features),
            read.input_ids[on],
            read.attention_mask[on],
            read_rows[on],
            batch.switch_packing,
            self.prefix_cache,
            media=batch.media_of_teacher,
            labels=read.labels[on],
        )
        if self.prefix_cache is not None and batch.switch_packing is None:
            self.meter.leave_out(int(on.sum()), read.input_ids.shape[1], self.prefix_cache.length)
        on_image = on.repeat_interleave(read_rows.sum(-1))
        return SwitchStates(through, lm_head_of(self.teacher), on_image, 1 / self.vsd_share)

    def _idle_vision(self, model: nn.Module) -> Tensor:
        """Run the student's vision tower and projector on a blank image, so that the graph contains them.

        In a text-only batch no gradient would reach the vision tower and the projector: DistributedDataParallel would wait for it
        while other processes have images, and a training stage with only the projector trainable would have no graph at all.
        A single process does it too: Adam updates a weight whose gradient is 0 but not one whose gradient is None, so results
        would otherwise depend on the number of processes.
        """
        student = self.accelerator.unwrap_model(model)
        media = blank_media(student.config) if self.sample_media is None else self.sample_media
        with capture_features(student) as features:
            outputs = image_outputs(student, media)
        seen = [*output_tensors(outputs), *adapt(student, features).values()]
        return torch.stack([each.sum() for each in seen]).sum()

    def _record(self, terms: LossTerms, count: Tensor, positions: Tensor) -> None:
        sums = [torch.zeros_like(terms.ce) if term is None else term.detach() for term in terms]
        self._logged = self._logged.to(positions.device)
        self._logged += torch.stack([*(s.double() for s in sums), count.double(), positions.double()])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, nats, each the objective's mean over the global batches since the last log."""
        if "loss" in logs:
            self.require_finite()
            sums = self.accelerator.reduce(self._logged.clone(), reduction="sum")
            *values, count, positions = sums.tolist()
            self._logged.zero_()
            means = dict(zip(self.objective.term_names, (value / max(count, 1) for value in values), strict=True))
            logs |= {f"loss_{name}": mean for name, mean in means.items()}
            # The Trainer averages over steps, whatever their length; this is the objective's mean, as the parts are.
            weights = (1.0, self.objective.align_weight, self.objective.vsd_weight)
            logs["loss"] = sum(weight * mean for weight, mean in zip(weights, means.values(), strict=True))
            extra = {} if self.extra_terms is None else self.extra_terms.take(self.accelerator)
            for name, (mean, weight) in extra.items():
                logs[f"loss_{name}"] = mean
                logs["loss"] += weight * mean
            logs["positions"] = positions
            if self.left_out is not None:
                met = self.left_out.take()
                self.left_out.merge(gather_object(met) if self.args.world_size > 1 else met)
                if self.left_out.rows:
                    logs["left_out"] = len(self.left_out.rows)
            peak = None if self.peak_tflops is None else self.peak_tflops * 1e12
            logs |= self.meter.take(self.accelerator, self._averaged, peak)
            if self.compiled:
                logs |= compilations()
            first = self.state.log_history == [] and self.is_world_process_zero()
            if self.objective.switch and first and means.get("vsd", 1.0) < NO_DISTANCE:
                log.warning(
                    "VSD is %.1e at the start: the student sees as the teacher does, so the switch pathway teaches it nothing. "
                    "That is right if both have the same vision tower",
                    means["vsd"],
                )
        super().log(logs, start_time)

    def require_finite(self) -> None:
        """Raise RunError, in all processes, if a loss since the last log or a weight is not finite in any process."""
        weights = [getattr(p, "ds_tensor", p.detach()) for p in self.model.parameters() if p.requires_grad]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in weights]
        here = torch.stack([self._logged.isfinite().all(), *(p.isfinite().all() for p in local)])
        bad = self.accelerator.reduce((~here).float(), reduction="sum").tolist()
        if any(bad):
            what = "the loss" if bad[0] else "a weight"
            raise RunError(
                f"{what} is not finite at step {self.state.global_step}, or since the check before (at every log and checkpoint); "
                "lower --lr or --grad-clip"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student; adapters of extra terms are saved in checkpoints only, not in the finished student."""
        if self.extra_terms is not None and not _internal_call:
            self.extra_terms.detach(self.accelerator.unwrap_model(self.model))
        super().save_model(output_dir, _internal_call)
