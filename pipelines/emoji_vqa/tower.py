"""A vision tower that names what every patch of an image shows, from which EmojiVQA's teacher and students start.

The paper starts both towers from one pretrained SigLIP. No package ships one of this size, so this one is trained here, on images
of its own that no question is asked about: each patch is classified by the thing that covers its centre, and by the colour of that
thing's card, sign or bar. Of the artists, things and fonts it sees those of the split `train` alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from switchkd.pipelines.emoji_vqa.build import styles
from switchkd.pipelines.emoji_vqa.concepts import kind_of
from switchkd.pipelines.emoji_vqa.drawings import read_drawings
from switchkd.pipelines.emoji_vqa.packages import PACKAGES, fetch
from switchkd.pipelines.emoji_vqa.scenes import COLORS, NUMBERS, SceneMaker, Shown
from switchkd.pipelines.preflight.processes import in_order
from switchkd.pipelines.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

NOTHING_WEIGHT = 0.2  # of a patch that shows nothing, in the loss of things
CHUNK = 200
NOTE_EVERY = 50


def things_of(concepts: Sequence[str]) -> list[str]:
    """Return the classes of things: concepts, digits, and bars by their value."""
    return [*concepts, *(f"digit {n}" for n in range(10)), *(f"bar of {NUMBERS[n]}" for n in range(1, 10))]


def labels_of(shown: Sequence[Shown], things: Mapping[str, int], side: int, patch: int) -> NDArray[np.int16]:
    """Return the classes of an image's patches.

    Args:
        shown: what is in the image. things: thing → its class, 0 … N − 1. side: patches in a row. patch: pixels of its side.

    Returns:
        [2, side, side]: the class of the thing, N for nothing; the class of the colour in sorted order, 8 for none.
    """
    colors = {name: index for index, name in enumerate(sorted(COLORS))}
    found = np.empty((2, side, side), np.int16)
    found[0], found[1] = len(things), len(colors)
    centers = (np.arange(side) + 0.5) * patch
    for one in shown:
        left, top, right, bottom = one.box
        rows, columns = (centers >= top) & (centers < bottom), (centers >= left) & (centers < right)
        inside = np.ix_(rows, columns)
        found[0][inside] = things[one.thing]
        found[1][inside] = len(colors) if one.color is None else colors[one.color]
    return found


@dataclass(frozen=True)
class _Images:
    """Draws a chunk of the tower's images: number of the chunk → images [CHUNK, size, size, 3], classes [CHUNK, 2, side, side]."""

    drawings: Any
    kinds: Mapping[str, str | None]
    size: int
    patch: int

    def __call__(self, chunk: int) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        style = styles(self.kinds)["train"]
        maker = SceneMaker(self.drawings, self.kinds, style, self.size, f"tower/{chunk}")
        things = {thing: index for index, thing in enumerate(things_of(style.concepts))}
        images, classes = [], []
        for _ in range(CHUNK):
            image, _ = maker.make()
            images.append(np.asarray(image))
            classes.append(labels_of(maker.shown, things, self.size // self.patch, self.patch))
        return np.stack(images), np.stack(classes)


def train_tower(
    packages: Path,
    out: Path,
    *,
    vision: Mapping[str, int],
    images: int = 40_000,
    steps: int = 2_800,
    batch: int = 128,
    lr: float = 1.5e-3,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Train a SigLIP tower on `images` drawn scenes, and write its weights in float16 to `out`, a safetensors file.

    It computes under autocast to bfloat16. `out` is written at the end.

    Args:
        packages: the folder of the drawings' packages. vision: arguments of SiglipVisionConfig. lr: the highest rate, of a cosine.

    Raises:
        DataError, RunError: see `packages.fetch`.
    """
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import SiglipVisionConfig, SiglipVisionModel

    kinds = kind_of()
    drawings = read_drawings(fetch(packages, PACKAGES), kinds, max(96, vision["image_size"]))
    shown, wanted = _draw(_Images(drawings, kinds, vision["image_size"], vision["patch_size"]), images, workers)
    things, colors = len(things_of(styles(kinds)["train"].concepts)), len(COLORS)
    torch.manual_seed(seed)
    tower = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **vision))
    heads = nn.Sequential(nn.LayerNorm(vision["hidden_size"]), nn.Linear(vision["hidden_size"], things + colors + 2))
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    order, rows = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    with Progress("tower", steps, "steps") as progress:
        for step in range(1, steps + 1):
            while len(rows) < batch:
                rows = torch.cat([rows, torch.randperm(len(shown), generator=order)])
            chosen, rows = rows[:batch], rows[batch:]
            pixels = shown[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                scores = heads(tower(pixels, output_hidden_states=True).hidden_states[-1])
            loss, right = _loss(
                scores.float().flatten(0, 1), wanted[chosen].flatten(2).transpose(0, 1).flatten(1), things
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            note = f"loss {loss.item():.3f}, things {right:.3f}" if step % NOTE_EVERY == 0 else ""
            progress.advance(1, note=note)
    save_file({name: tensor.half().contiguous() for name, tensor in tower.state_dict().items()}, out)


def _draw(draw: _Images, images: int, workers: int) -> "tuple[Tensor, Tensor]":
    """Return images [N, size, size, 3] uint8 and their patches' classes [N, 2, side, side] int64, N a multiple of `CHUNK`."""
    import torch

    pixels, classes = [], []
    with Progress("drawing", images, "images") as progress:
        for image, label in in_order(draw, list(range(-(-images // CHUNK))), workers):
            pixels.append(image)
            classes.append(label)
            progress.advance(len(image))
    return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(classes)).long()


def _loss(scores: "Tensor", wanted: "Tensor", things: int) -> "tuple[Tensor, float]":
    """Return CE of things plus CE of colours, and the share of the covered patches whose thing is right.

    Args:
        scores: [P, things + 1 + colors + 1]. wanted: [2, P], the classes of `labels_of`.
    """
    import torch
    from torch.nn import functional

    weight = torch.ones(things + 1)
    weight[-1] = NOTHING_WEIGHT
    of_things, of_colors = scores[:, : things + 1], scores[:, things + 1 :]
    loss = functional.cross_entropy(of_things, wanted[0], weight) + functional.cross_entropy(of_colors, wanted[1])
    covered = wanted[0] < things
    right = (of_things.argmax(-1) == wanted[0])[covered].float().mean()
    return loss, float(right)
