"""Overrides of private methods of transformers' Trainer: how a checkpoint is written and read.

transformers calls these methods by name and may change them in any release. They are collected here, and a test compares their
names and signatures with those of the installed Trainer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from switchkd.losses.baselines import ADAPTERS
from switchkd.pipelines.preflight.left_out import LeftOut
from switchkd.pipelines.run_folder import sync_tree
from switchkd.pipelines.training.lifecycle import begun, checkpointing, sealed

# The private methods of `transformers.Trainer` that `CheckpointHooks` overrides, with their parameters.
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_save_checkpoint": ("model", "trial"),
    "_get_output_dir": ("trial",),
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_save_rng_state": ("output_dir",),
    "_load_rng_state": ("checkpoint",),
}


class CheckpointHooks(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are whole, exact and free of pickles; DeepSpeed writes its own.

    `processing_class` is a list, saved with every checkpoint, see `checkpoint.readers_of`.
    """

    writing_into: Path | None = None  # the folder for the checkpoint that is being saved
    left_out: LeftOut | None = None  # saved with every checkpoint

    def require_finite(self) -> None:
        """Raise RunError if the state to be saved is not usable; subclasses define the check."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, unless the state to be saved is not usable; see `lifecycle.sealed` for how it is committed."""
        self.require_finite()
        run, first = Path(self.args.output_dir), self.is_world_process_zero()
        self.writing_into = run / sealed.UNFINISHED
        try:
            if first:
                sealed.clear_unfinished(run)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            name = f"{begun.PREFIX}{self.state.global_step}"
            if self.is_deepspeed_enabled:
                sync_tree(self.writing_into / name)  # every process writes shards
            self.accelerator.wait_for_everyone()
            if first:
                sealed.commit(run, name, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()  # else one that ends now could take the first with it
        except Exception:
            if first:
                sealed.clear_unfinished(run)  # what it holds of a full disk is needed
            raise
        finally:
            self.writing_into = None

    def _get_output_dir(self, trial: Any) -> str:
        """Return where the checkpoint that is being saved is written; else the run's folder."""
        return str(self.writing_into or super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student; every process calls it, the first one writes."""
        if self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, checkpointing.whole_weights(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save model, tokenizer and image processor; nothing pickled (the stock Trainer pickles its arguments)."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        # The finished student is saved with the usual parameter names of Llava checkpoints; a checkpoint of the run with those that
        # the model itself uses, since a resumed run finds every weight only under these names.
        finished = self.writing_into is None
        if state_dict is not None:
            if finished:  # while a run goes on, the best student is saved beside the adapters of a baseline's objective
                state_dict = {name: each for name, each in state_dict.items() if f"{ADAPTERS}." not in name}
            state_dict = checkpointing.set_apart_adapter(Path(folder), state_dict)
            state_dict = checkpointing.set_apart_lora(Path(folder), self.model, state_dict, finished)
        self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=finished)
        for processor in self.processing_class:
            with _plain_failures(folder):
                processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the student's weights; a missing or unknown name is an error (the stock Trainer only warns)."""
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpointing.load_weights(Path(resume_from_checkpoint), self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            optimizer = self.optimizer.optimizer  # unwrap accelerate's wrapper
            checkpointing.save(Path(output_dir), self.model, optimizer, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            scheduler = checkpointing.load(Path(checkpoint), self.model, self.optimizer.optimizer)
            self.lr_scheduler.load_state_dict(scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpointing.save_rng(Path(output_dir), self.args.process_index)
        if self.left_out is not None:
            self.left_out.save(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpointing.load_rng(Path(checkpoint), self.args.process_index)
            if self.left_out is not None:
                self.left_out.load(Path(checkpoint))


@contextmanager
def _plain_failures(folder: str) -> Iterator[None]:
    """Raise OSError for the bare Exception by which tokenizers reports that it cannot write."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"cannot write into {folder}: {error}") from error
