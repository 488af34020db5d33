"""The batch of samples that losses, teachers and metrics read, with its columns as named fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from switchkd.models.features import media_of


class TextInputs(NamedTuple):
    """The inputs of a language model for a batch."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64, -100 where not supervised
    packing: Tensor | None  # [R, N] int64, see `switchkd.models.packing`; None with one sample per row


@dataclass(frozen=True)
class Batch:
    """B samples, padded to L tokens, with P positions in all. All tensors are on one device.

    A batch is passed as a dict of columns, since transformers' Trainer moves a dict to a device; `of` reads it.

    Attributes:
        input_ids, attention_mask, labels: [B, L] int64, as the student reads the samples; a label is -100 where not supervised.
        has_image: [B] bool.
        switched: [B] bool, which of the samples with an image pass the switch pathway; None: all of them, see `on_switch`.
        pixel_values: [images, 3, H, W] float32, or as the model's family has it; None in a text-only batch.
        image_grid_thw, image_sizes, pixel_attention_mask, batch_num_images: what some families take beside the pixels, see
            `switchkd.models.families.Family.media`.
        teacher_media: the same images as the teacher's own processor makes them, by column; None if it reads the student's.
        packing: [R, N] int64, how samples share rows; None with one sample per row.
        teacher_input_ids, teacher_attention_mask, teacher_labels: [B, L_T] int64, if the teacher encodes samples differently.
        teacher_packing: [R, N_T] int64, with the same samples per row, if it encodes them differently.
        switch_packing: [R', N'] int64, of the samples on the switch pathway as the teacher encodes them, in separate rows.
        partner: [P] int64, with another tokenizer: the teacher's position of each of the student's, or -1.
        teacher_knee: [P] int64, from a store.
        teacher_ids: [P, K] int64; teacher_logits: [P, K]; teacher_tail: [P]: from a store that contains top-k logits.
        teacher_hidden: [P, d_T], from a store that contains hidden states. With another tokenizer these five have P_T rows.
        teacher_number: [P] int64, with the stores of several teachers: whose each position is.
        teacher_visual_advantage: [P], nats, from a store, with `--weight-by visual-advantage`.
        store_seconds: time spent reading the store.
        left_out: the samples that belong to the batch and cannot be used, the fields of a `preflight.left_out.Unusable` each.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    has_image: Tensor
    switched: Tensor | None = None
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    image_sizes: Tensor | None = None
    pixel_attention_mask: Tensor | None = None
    batch_num_images: Tensor | None = None
    teacher_media: dict[str, Tensor] | None = None
    packing: Tensor | None = None
    teacher_input_ids: Tensor | None = None
    teacher_attention_mask: Tensor | None = None
    teacher_labels: Tensor | None = None
    teacher_packing: Tensor | None = None
    switch_packing: Tensor | None = None
    partner: Tensor | None = None
    teacher_ids: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_tail: Tensor | None = None
    teacher_knee: Tensor | None = None
    teacher_hidden: Tensor | None = None
    teacher_number: Tensor | None = None
    teacher_visual_advantage: Tensor | None = None
    store_seconds: float = 0.0
    left_out: tuple[Any, ...] = ()

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "Batch":
        """Read a dict of columns. Raises TypeError for an unknown column, and for a missing one."""
        return cls(**columns)

    @property
    def on_switch(self) -> Tensor:
        """Which samples pass the switch pathway, [B] bool."""
        return self.has_image if self.switched is None else self.switched

    @property
    def media(self) -> dict[str, Tensor]:
        """The columns of the images that exist; empty in a text-only batch."""
        return media_of(vars(self))

    @property
    def media_of_teacher(self) -> dict[str, Tensor]:
        """The images as the teacher reads them."""
        return self.media if self.teacher_media is None else self.teacher_media

    @property
    def teacher_inputs(self) -> TextInputs:
        """The inputs of the teacher's language model: its own encoding of the samples, or the student's if they are equal."""
        if self.teacher_input_ids is None or self.teacher_attention_mask is None or self.teacher_labels is None:
            return TextInputs(self.input_ids, self.attention_mask, self.labels, self.packing)
        packing = self.packing if self.teacher_packing is None else self.teacher_packing
        return TextInputs(self.teacher_input_ids, self.teacher_attention_mask, self.teacher_labels, packing)
