"""A Trainer that evaluates its student on held-out samples, as `held_out.evaluator` does, and goes on as if it had not."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from switchkd.losses.objective import Objective
from switchkd.models.prefix_cache import SharedPrefixCache
from switchkd.pipelines.training.held_out.best import BestStudent
from switchkd.pipelines.training.held_out.evaluator import Evaluator
from switchkd.pipelines.training.step_ways.copying_trainer import CopyingTrainer


class EvaluatingTrainer(CopyingTrainer):
    """Evaluates when a callback asks for it; `SwitchTrainer` sets what is declared here, and saves as `CheckpointHooks` does."""

    evaluator: Evaluator | None = None
    best: BestStudent | None = None
    objective: Objective
    source: Any
    extra_terms: Any
    vocab_map: Any
    meter: Any
    vsd_share: float
    prefix_cache: SharedPrefixCache | None
    control: Any

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the student on held-out samples, log the metrics, and keep the student if it is the best so far.

        transformers' Trainer calls it after the step in which a callback asked for it, before it saves a checkpoint. What the run
        computes next is what it would have computed without. The arguments are not used.
        """
        assert self.evaluator is not None
        with self._evaluating(self.evaluator.held_out.with_teacher), self.reading_copies():
            found = self.evaluator.measure(self)
        started = time.perf_counter()
        self.log(dict(found))
        if self.best is not None and self.best.improves(found):
            self.require_finite()
            first, save = self.is_world_process_zero(), super().save_model
            self.best.keep(self.state.global_step, found, lambda folder: save(str(folder)), first)
            self.accelerator.wait_for_everyone()
        self.meter.pause(found["eval_seconds"] + time.perf_counter() - started)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @contextmanager
    def _evaluating(self, with_teacher: bool) -> Iterator[None]:
        """Put aside what belongs to the run's own batches: metrics, the prefix that the teacher knows, terms of a baseline."""
        names = ("objective", "source", "extra_terms", "vocab_map", "meter", "prefix_cache", "vsd_share")
        before = {name: getattr(self, name) for name in names}
        self.meter = self.meter.unlogged()
        self.prefix_cache = None if self.prefix_cache is None else SharedPrefixCache()
        self.extra_terms, self.vsd_share = None, 1.0  # all held-out samples pass the switch pathway
        self.objective = replace(
            self.objective, weight_by=None
        )  # comparable, and the held-out store need not hold advantages
        if not with_teacher:
            self.objective = Objective("sft", False, normalize_by=self.objective.normalize_by)
            self.source = self.vocab_map = None
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)
