"""One evaluation of a student that trains: metrics of held-out samples, without a trace in what is trained."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device

from switchkd.data.encoded import Prompt
from switchkd.data.samples import BadSample, Sample
from switchkd.errors import DataError
from switchkd.models.block_attention import without_block_attention
from switchkd.models.components import language_model_of
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.evaluation.exact_match import normalise
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.training.batches.collator import Collator
from switchkd.pipelines.training.held_out.inputs import HeldOut
from switchkd.pipelines.training.held_out.student_advantage import StudentAdvantage
from switchkd.pipelines.training.lifecycle.stopping import RunLoader
from switchkd.positions import count_positions

NEW_TOKENS = 32  # of an answer, as `switchkd eval` cuts it
PREFIX = "eval_"  # of the names of metrics in the log


class Evaluator:
    """Computes the metrics of held-out samples; every process of a run calls it at the same steps.

    Args:
        held_out: the samples. collator: makes batches of them, of the run's batch size. batch_size: samples and prompts at a time.
        sharded: whether the student's layers are gathered by all processes together. Then all answer the same questions.
    """

    def __init__(self, held_out: HeldOut, collator: Collator, batch_size: int, sharded: bool) -> None:
        self.held_out, self.collator, self.batch_size, self.sharded = held_out, collator, batch_size, sharded
        self.advantage = StudentAdvantage(held_out, collator.pad_id, batch_size)
        order = sorted(held_out.chosen, key=lambda item: -_length(held_out, item))  # neighbours need little padding
        self.batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]

    def measure(self, trainer: Any) -> dict[str, float]:
        """Return the metrics, by their names in the log.

        The model is put into evaluation mode and back; random states, the data's order and the trainer's own metrics stay as they
        are.

        Args:
            trainer: a `SwitchTrainer` within a run, whose `objective` and `source` are those of the evaluation.

        Raises:
            DataError: no sample could be used. StoreMismatch: a sample is not the cached one.
        """
        started, model = time.perf_counter(), trainer.model
        device = trainer.args.device
        with _in_evaluation(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = self._losses(trainer, model) | self._exact_match(trainer, model)
            found |= self.advantage.measure(trainer, model)
        found["seconds"] = time.perf_counter() - started
        return {PREFIX + name: value for name, value in found.items()}

    @torch.no_grad()
    def _losses(self, trainer: Any, model: Any) -> dict[str, float]:
        objective, args = trainer.objective, trainer.args
        processes, own = args.world_size, self.batches[args.process_index :: args.world_size]
        own += [[]] * (-(-len(self.batches) // processes) - len(own))  # sharded layers run as often in every process
        sums = torch.zeros(5, dtype=torch.float64, device=args.device)  # CE, Align, VSD, their divisor, positions
        loader = RunLoader(
            self.held_out.samples,
            args,
            batch_sampler=own,
            collate_fn=self.collator,
            generator=torch.Generator(),  # the global one is the run's
        )
        for columns in loader:
            batch = Batch.of(send_to_device(columns, args.device))
            with trainer.compute_loss_context_manager():
                terms = trainer.loss_terms(model, batch).terms
            counts = [objective.count(batch.labels), count_positions(batch.labels).sum()]
            values = [sums.new_zeros(()) if value is None else value for value in (*terms, *counts)]
            sums += torch.stack([value.to(sums.dtype) for value in values])
        ce, align, vsd, count, positions = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        if not count:
            raise DataError(f"no held-out sample of {self.held_out.samples.samples.path} could be used")
        found = {"loss_ce": ce / count}
        if self.held_out.with_teacher:
            found["loss_align"] = align / count
            if objective.switch:
                found["loss_vsd"] = vsd / count
            found["loss"] = (ce + objective.align_weight * align + objective.vsd_weight * vsd) / count
        elif self.held_out.ce_alone:
            found["loss"] = ce / count
        return found | {"positions": positions}

    def _exact_match(self, trainer: Any, model: Any) -> dict[str, float]:
        """Return the share of right answers; see `switchkd.pipelines.evaluation.exact_match`."""
        if not self.held_out.questions:
            return {}
        args, encoder = trainer.args, self.held_out.samples.encoder
        size = self.batch_size
        batches = [self.held_out.questions[at : at + size] for at in range(0, len(self.held_out.questions), size)]
        own = batches if self.sharded else batches[args.process_index :: args.world_size]
        counts = torch.zeros(2, dtype=torch.float64, device=args.device)  # answered, right
        with _own_settings(model), without_block_attention(language_model_of(model)):
            generator = GreedyGenerator(model, encoder, encoder.template, NEW_TOKENS)
            for batch in own:
                prompts = [_prompt(encoder, *question) for question in batch]
                for (sample, turn), answer in zip(batch, generator.answer(prompts), strict=True):
                    if not isinstance(answer, BadSample):
                        counts += counts.new_tensor([1, normalise(answer) == normalise(sample.turns[turn][1])])
        if not self.sharded:
            counts = trainer.accelerator.reduce(counts, reduction="sum")
        answered, right = counts.tolist()
        return {"exact_match": right / answered, "answers": answered} if answered else {}


def _length(held_out: HeldOut, item: int) -> int:
    sample = held_out.samples.samples[int(held_out.samples.usable[item])]
    return sum(len(text) for turn in sample.turns for text in turn)


def _prompt(encoder: Any, sample: Sample, turn: int) -> Prompt | BadSample:
    try:
        found: Prompt = encoder.encode_prompt(sample, turn)
    except BadSample as bad:
        return bad
    return found


@contextmanager
def _in_evaluation(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Give a model its generation settings back, which a checkpoint holds, too."""
    before = model.generation_config
    try:
        yield
    finally:
        model.generation_config = before
