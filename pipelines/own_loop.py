"""A teacher store in a training loop of your own: the public names for it, explained in docs/own-loop.md.

    store = StoreDataset("stores/data.zarr")              the teacher's output by row of the data file
    data = EncodedDataset("data.json", "STUDENT", store)  the data file as the student reads it, usable rows alone
    collate = TeacherCollator(pad_encoded, store)         any collator, and the teacher's columns of its samples
    teacher = StoredTeacher(store, "TEACHER")             the signal of a batch, which the losses take

Losses are in `switchkd.losses`. Names and meaning of what `__all__` lists stay what they are between minor versions.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from switchkd.counting import counted
from switchkd.data.encoded import EncodedSample, collate, pad_id_of
from switchkd.data.samples import SampleFile, Status
from switchkd.errors import ConfigError, StoreMismatch
from switchkd.fingerprints import SampleDigest, digest_sample
from switchkd.losses.signals import TeacherSignal
from switchkd.models.checkpoint import open_checkpoint, teacher_identity, with_image_mode
from switchkd.models.families import logit_map_of
from switchkd.models.vlm import load_lm_head
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.stored_teacher import (
    StoredHidden,
    StoredTopK,
    TeacherSource,
    changed_since,
    encoder_of_store,
    teacher_columns,
)
from switchkd.positions import IGNORED, count_positions
from switchkd.settings import StoreLocation, TailPolicy
from switchkd.stores import TeacherStore

__all__ = ["EncodedDataset", "StoreDataset", "StoredTeacher", "TeacherCollator", "pad_encoded"]

COLUMNS = ("teacher_knee", "teacher_ids", "teacher_logits", "teacher_tail", "teacher_hidden")
POSITIONS = "teacher_positions"  # [B] int64, of each sample of a batch


class StoreDataset(Dataset[dict[str, Tensor]]):
    """A complete store as a dataset: item `row` is the teacher's output for that row of the data file.

    An item has, over the P positions of its row (none where the row was skipped):

    * `teacher_knee` [P] int64;
    * of payload `hidden`: `teacher_hidden` [P, d] float32, the final hidden states;
    * of payload `topk`: `teacher_ids` [P, K] int64 and `teacher_logits` [P, K] float32 in descending order, `teacher_tail` [P]
      float32, the logsumexp of all other logits;
    * with `visual_advantage`: `teacher_visual_advantage` [P] float32, nats.

    Args:
        store: its folder or URL, or a folder with one store.
        payload: which one is read of a store that has both; None: `hidden` if it is there.
        visual_advantage: whether it is read, for `switchkd.losses.visual_weights`.

    Raises:
        StoreError: no store there, an unfinished or a damaged one.
        ConfigError: the store does not hold the payload, or no visual advantage.
    """

    def __init__(
        self,
        store: StoreLocation,
        payload: Literal["topk", "hidden"] | None = None,
        visual_advantage: bool = False,
    ) -> None:
        opened = TeacherStore.open(Path(store) if isinstance(store, str) and "://" not in store else store)
        opened.check_complete()
        manifest = opened.manifest
        held = {"hidden": manifest.has_hidden, "topk": manifest.has_topk}
        self.payload = payload or ("hidden" if manifest.has_hidden else "topk")
        if not held.get(self.payload, False):
            there = " and ".join(name for name, here in held.items() if here)
            raise ConfigError(
                f"{opened.path} holds payload {there}, not {self.payload}: pass payload={there.split()[0]!r}"
            )
        if visual_advantage and not manifest.visual_advantage:
            raise ConfigError(
                f"{opened.path} holds no visual advantage: cache again into another --out with `switchkd cache-teacher "
                "--visual-advantage`, or leave visual_advantage out"
            )
        self.store = opened.only(self.payload, visual_advantage)
        self.rows: NDArray[np.int64] = np.flatnonzero(self.store.statuses() == Status.OK)  # those that are usable

    def __len__(self) -> int:
        """Return the number of rows of the data file, usable or not."""
        return len(self.store)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.columns([row])

    def columns(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the positions of several rows, joined in their order; faster than row by row.

        Raises:
            IndexError: no such row. StoreError, StoreUnreadable, RunError: see `TeacherStore`.
        """
        return teacher_columns(self.store.payload(list(map(int, rows))))

    def require_same(self, row: int, digest: SampleDigest, image: bool = True) -> None:
        """Raise StoreMismatch if a sample is not the one that was cached, naming what differs.

        Args:
            row: of the data file. digest: of the sample, see `switchkd.fingerprints.digest_sample`.
            image: whether the digest has its image; else text and mask alone are compared.
        """
        cached = SampleDigest(*self.store.digest(row))
        if not image:
            digest = digest._replace(image=cached.image)
        if changed := digest.differing(cached):
            raise StoreMismatch(
                f"row {row}: its {changed_since(changed, self.store)}. The tokens must be those that were cached: "
                "the store's template and limits, the teacher's tokenizer, nothing truncated; `EncodedDataset` makes them"
            )


class EncodedDataset(Dataset[dict[str, Any]]):
    """The usable rows of a data file as a vision-language model reads them, with the template and limits of a store.

    An item is a mapping: `row` int, its row in the data file; `input_ids` [L] and `labels` [L] int64, a label -100 where not
    supervised; `digest`, of text, mask and image; and the media of its images by column, as the model's processor makes them (of a
    Llava `pixel_values` [1, 3, H, W]). `pad_encoded` makes batches of items.

    Args:
        data: the data file that was cached. checkpoint: the folder of the model that reads it, as a rule the student's.
        store: of that data file. images: the folder that the data file's image paths start from.

    Raises:
        StoreMismatch: the store has another number of rows, or was made with another tokenizer or number of image tokens.
        CheckpointError, DataError: the checkpoint or the data file cannot be used.
    """

    def __init__(
        self, data: str | Path, checkpoint: str | Path, store: StoreDataset, images: str | Path | None = None
    ) -> None:
        manifest = store.store.manifest
        opened = with_image_mode(open_checkpoint(checkpoint), manifest.image_mode, manifest.max_pixels)
        wanted = {"tokenizer": opened.tokenizer_hash, "image_tokens": opened.image_tokens}
        if mismatches := manifest.mismatches(wanted):
            raise StoreMismatch(f"{store.store.path} does not fit {checkpoint}: {mismatches[0]}")
        self.samples = SampleFile(Path(data))
        if len(self.samples) != len(store):
            raise StoreMismatch(
                f"{store.store.path} was made from {counted(len(store), 'row')}, {data} has {len(self.samples)}: "
                "pass the file that was cached"
            )
        self.encoder = encoder_of_store(manifest, opened, None if images is None else Path(images))
        self.pad_id = pad_id_of(opened.tokenizer)
        self.rows = store.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        sample = self.encoder.encode(self.samples[row])
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(sample.supervised), ids, IGNORED)
        found = {"row": row, "input_ids": ids, "labels": labels, "digest": sample.digest}
        return found | dict(sample.media or {})


def pad_encoded(samples: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, Any]:
    """Make a batch of items of `EncodedDataset`, padded on the right.

    Args:
        pad_id: any token; it is masked.

    Returns:
        `input_ids`, `attention_mask`, `labels` [B, L] int64, and the media of all images, by column; none in a text-only batch.
    """
    encoded = []
    for sample in samples:
        media = {name: value for name, value in sample.items() if name not in ("row", "input_ids", "labels", "digest")}
        ids, supervised = sample["input_ids"].numpy().astype(np.int32), (sample["labels"] != IGNORED).numpy()
        encoded.append(EncodedSample(ids, supervised, media or None, sample["digest"]))
    batch = collate(encoded, pad_id)
    del batch["has_image"]
    return batch


class TeacherCollator:
    """Makes a batch with any collator, and adds the teacher's columns of its samples; to be used as `collate_fn`, in any worker.

    Every sample is compared with the one that was cached, so that no position meets another token's teacher.

    Args:
        collator: is given the samples without `row` and `digest`, unless it is `pad_encoded`; must keep their order.
        store: the teacher's output.

    A sample is a mapping with `row`, its row of the data file; `input_ids` [L] and `labels` [L], unpadded, -100 where not
    supervised; and `digest`, if the image is to be compared, too. The batch has the columns of `StoreDataset`, joined over its
    samples, and `teacher_positions` [B] int64, how many are each sample's.

    Raises:
        StoreMismatch: a sample is not the cached one, or was skipped by the store.
        ConfigError: a sample lacks a key.
    """

    def __init__(
        self, collator: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]], store: StoreDataset
    ) -> None:
        self.collator, self.store = collator, store
        self._usable = frozenset(store.rows.tolist())

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        counts = [self._compared(sample) for sample in samples]
        own = getattr(self.collator, "func", self.collator) is pad_encoded  # a partial has the function as `func`
        given = samples if own else [{k: v for k, v in each.items() if k not in ("row", "digest")} for each in samples]
        batch = dict(self.collator(given))
        batch |= self.store.columns([sample["row"] for sample in samples])
        batch[POSITIONS] = torch.tensor(counts, dtype=torch.int64)
        return batch

    def _compared(self, sample: Mapping[str, Any]) -> int:
        """Compare a sample with the cached one; returns its number of positions."""
        if missing := [name for name in ("row", "input_ids", "labels") if name not in sample]:
            raise ConfigError(
                f"a sample lacks {missing[0]!r}: TeacherCollator needs row, input_ids and labels of every sample"
            )
        row = int(sample["row"])
        if row not in self._usable:
            raise StoreMismatch(
                f"row {row} has no teacher's output in {self.store.store.path}: take the rows of StoreDataset.rows"
            )
        ids, labels = (np.asarray(sample[name]) for name in ("input_ids", "labels"))
        digest = sample.get("digest") or digest_sample(ids.astype(np.int32), labels != IGNORED, None)
        self.store.require_same(row, digest, image="digest" in sample)
        return int((labels[1:] != IGNORED).sum())


class StoredTeacher:
    """Makes the teacher's signal of a batch from the columns that `TeacherCollator` added.

    Args:
        store: the teacher's output.
        teacher: checkpoint folder of the teacher, whose LM head turns hidden states into logits (the only weights that are read);
            must be that of the store. Not needed with payload `topk`.
        dtype: of the LM head: "auto", the checkpoint's own, or "float32", "bfloat16", …
        tail: with payload `topk`, what stands for the logits that it does not hold, see `switchkd.losses.signals.TAIL_POLICIES`.

    Raises:
        ConfigError: payload `hidden` without a teacher.
        StoreMismatch: the store is of another teacher; names what differs.
        CheckpointError: the checkpoint cannot be used.
    """

    def __init__(
        self,
        store: StoreDataset,
        teacher: str | Path | None = None,
        *,
        dtype: str = "auto",
        tail: TailPolicy = "student",
    ) -> None:
        manifest = store.store.manifest
        self._source: TeacherSource
        if store.payload == "topk":
            self._source = StoredTopK(manifest.vocab_rows, tail)
            return
        if teacher is None:
            raise ConfigError("payload hidden needs the teacher's LM head: pass the teacher's checkpoint folder")
        opened = open_checkpoint(teacher)
        if mismatches := manifest.mismatches({"teacher": teacher_identity(opened, vision=False)}):
            raise StoreMismatch(f"{store.store.path} is not of {teacher}: {mismatches[0]}")
        head = load_lm_head(opened, opened.resolve_dtype(dtype))
        logit_map = logit_map_of(opened.config, opened.path)
        self._source = StoredHidden(head, manifest.vocab_rows, manifest.has_exact_knee, logit_map)

    def to(self, device: torch.device | str) -> "StoredTeacher":
        """Move the LM head to a device; returns itself."""
        self._source.to(torch.device(device))
        return self

    def signal(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Return the teacher's signal at the batch's P positions, in the order of `switchkd.positions.predicting_rows`.

        Args:
            batch: with `labels` [B, L] and the columns of `TeacherCollator`, on the teacher's device.

        Raises:
            ConfigError: the batch has no such columns.
            StoreMismatch: labels and columns do not have the same positions, as after a collator that truncates or reorders.
        """
        if POSITIONS not in batch or "labels" not in batch:
            raise ConfigError("the batch lacks the teacher's columns or its labels: make it with TeacherCollator")
        labels, cached = batch["labels"], batch[POSITIONS]
        here = count_positions(labels)
        if not torch.equal(here, cached.to(here.device)):
            raise StoreMismatch(
                f"the samples of this batch have {here.tolist()} positions, the store {cached.tolist()}: the collator must keep "
                "the order of the samples and all of their tokens"
            )
        columns = {name: batch[name] for name in COLUMNS if name in batch}
        nothing = labels.new_zeros(len(labels), dtype=torch.bool)
        return self._source.signal(
            Batch(labels, labels, labels, nothing, **columns)
        )  # reads the teacher's columns alone
