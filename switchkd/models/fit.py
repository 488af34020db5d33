"""Whether a student's vision features fit a teacher's projector: what each side's projector reads of one image, without weights."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from switchkd.errors import CheckpointError
from switchkd.models.components import language_model_of
from switchkd.models.families import family_of
from switchkd.models.features import capture_features, cut_shapes, image_outputs, tensors_in
from switchkd.models.hollow import built_of, hollow_out

PROBE_ROWS = 64  # of the vocabulary of a model whose language model is not run


@dataclass(frozen=True)
class Cuts:
    """What enters a model's projector for one image, and what comes out."""

    shapes: dict[str, tuple[int, int]]  # cut → (rows, width)
    tokens: int  # image tokens

    @property
    def widths(self) -> dict[str, int]:
        """Return cut → width."""
        return {cut: width for cut, (_, width) in self.shapes.items()}


def probe_cuts(config: Any, media: Mapping[str, Tensor]) -> Cuts:
    """Measure what a model's projector reads of an image, with random weights, and none for the layers of tower and language model.

    A process builds such a model once for a config and an image.

    Args:
        config: of any family. media: of one image, as the checkpoint's processor makes it.

    Raises:
        CheckpointError: the class lacks a module of its projector, or a tower.
    """
    key = _key_of(config, media)
    if key not in _MEASURED:
        _MEASURED[key] = _measured(config, media)
    return _MEASURED[key]


_MEASURED: dict[str, Cuts] = {}


def _key_of(config: Any, media: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(f"{type(config).__name__} {config.to_json_string()}".encode(), digest_size=16)
    for name, value in sorted(media.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _measured(config: Any, media: Mapping[str, Tensor]) -> Cuts:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.vocab_size = PROBE_ROWS
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    model = built_of(_probe_class(AutoModelForImageTextToText._model_mapping[type(config)]), small)
    with torch.no_grad(), capture_features(model) as features:
        outputs = image_outputs(model, media)
    tokens = sum(value.numel() // value.shape[-1] for value in tensors_in(outputs.pooler_output))
    return Cuts(cut_shapes(features), tokens)


@cache
def _probe_class(kind: type[Any]) -> type[Any]:
    """Return a subclass of a model class without the layers of its tower and its language model."""

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        hollow_out(self)
        language = language_model_of(self)
        for name, module in list(language.named_children()):
            if isinstance(module, nn.ModuleList):
                setattr(language, name, nn.ModuleList())

    return type(f"Probe{kind.__name__}", (kind,), {"__init__": build, "config_class": kind.config_class})


def check_cuts(
    teacher: tuple[Path, Any, Mapping[str, Tensor]],
    student: tuple[Path, Any, Mapping[str, Tensor]],
    adapter: bool = False,
) -> tuple[Cuts, Cuts]:
    """Check that the teacher's projector can read the student's vision features of an image, and return what each side reads.

    Args:
        teacher, student: (path, config, media of one and the same image as this side's processor makes it).
        adapter: whether a switch adapter maps the features, so that their widths may differ.

    Raises:
        CheckpointError: names both values of the first property that does not match.
    """
    sides = f"teacher {teacher[0]}, student {student[0]}"
    kinds = [family_of(config, path).model_type for path, config, _ in (teacher, student)]
    of_teacher, of_student = (probe_cuts(config, media) for _, config, media in (teacher, student))
    theirs, mine = of_teacher.shapes, of_student.shapes
    said = family_of(student[1]).switch_note
    note = f" ({said})" if said else ""
    if set(theirs) != set(mine):
        raise CheckpointError(
            f"the switch pathway feeds vision features to a projector that reads them in other places: {sides}. A {kinds[0]} "
            f"reads them at {', '.join(theirs)}, a {kinds[1]} gives them at {', '.join(mine)}; take two models of one family, or "
            "pass --no-switch"
        )
    for cut in theirs:
        (rows, width), (own_rows, own_width) = theirs[cut], mine[cut]
        if rows != own_rows:
            raise CheckpointError(
                f"an image becomes {rows} vision features for the teacher and {own_rows} for the student (at {cut}): {sides}. "
                f"Choose models with the same patches and tiles, or pass --no-switch{note}"
            )
        if width != own_width and not adapter:
            raise CheckpointError(
                f"the switch pathway feeds the student's vision features (width {own_width}) to the teacher's projector (width "
                f"{width}, at {cut}): {sides}. Choose a tower of the teacher's width, --switch-adapter linear, or --no-switch"
            )
    return of_teacher, of_student
