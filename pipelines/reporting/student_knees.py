"""Comparison of a trained student's knees with its teacher's, at the same positions (paper, eqs. 8-9)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from switchkd.data.encoding import collate, pad_id_of
from switchkd.data.samples import SampleFile
from switchkd.errors import ConfigError
from switchkd.fingerprints import hash_tokenizer
from switchkd.losses import kneedle
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.models.components import lm_head_of
from switchkd.models.vlm import freeze, load_model, states_at_positions
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.reporting.inputs import TrainRun
from switchkd.pipelines.stored_teacher import choose_samples, encode_as_cached, encoder_of_store
from switchkd.stores import TeacherStore

BATCH = 8


def knees_beside(run: TrainRun, store: TeacherStore, samples: int, device: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run a student over random samples of a store, and return (its knees, the teacher's), [P] each.

    Args:
        run: a finished training run; its data file and images must still exist. samples: their maximum number. device: of torch.

    Raises:
        ConfigError: the run's tokenizer differs from the store's. StoreMismatch: a sample changed since it was cached.
    """
    manifest = store.manifest
    checkpoint = with_image_mode(open_checkpoint(run.path), manifest.image_mode, manifest.max_pixels)
    if hash_tokenizer(checkpoint.tokenizer) != manifest.tokenizer:
        raise ConfigError(
            f"{run.path} and {store.path} have other tokenizers; report on them apart, or without --knees"
        )
    images = run.options.get("images")
    encoder = encoder_of_store(manifest, checkpoint, None if images is None else Path(images))
    data = SampleFile(Path(run.options["data"]))
    chosen = choose_samples(store, samples, seed=0)
    model: Any = freeze(load_model(checkpoint, dtype="float32")).to(device)
    of_student: list[NDArray[Any]] = [np.empty(0)]
    of_teacher: list[NDArray[Any]] = [np.empty(0)]
    with Progress(f"knees of {run.label}", len(chosen), "samples") as progress:
        for start in range(0, len(chosen), BATCH):
            indices = chosen[start : start + BATCH]
            batch = [encode_as_cached(encoder, data, store, index) for index in indices]
            with torch.no_grad():
                states = states_at_positions(model, collate(batch, pad_id_of(checkpoint.tokenizer)))
                logits = lm_head_of(model).logits(states)[:, : manifest.vocab_rows]
            of_student.append(kneedle(logits.float()).cpu().numpy())
            of_teacher.append(store.payload(indices).stat("knee"))
            progress.advance(len(batch), positions=len(logits))
    return np.concatenate(of_student), np.concatenate(of_teacher)
