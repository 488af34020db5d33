"""What the switch pathway saves by running the text before the image once: forward and backward at several layouts.

    python benchmarks/prefix_cache.py

A frozen language model of 19 million parameters (width 512, 6 layers, random weights), float32, one thread; batches of samples
with the same text before the image. `kept`: a batch that begins like the one before; `new`: one that does not. Times are medians
of CPU time, each run in a process of its own, in turns (side_by_side.py); FLOP are those that torch counts.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from side_by_side import measure
from step import IMAGE_TOKEN, VOCABULARY, make_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from switchkd.models.prefix_cache import SharedPrefixCache
from switchkd.models.switch import switch_states
from switchkd.models.vlm import LlavaWithoutVision, freeze

AFTER, ANSWER = 20, 60  # tokens of the question and of the answer
FEATURES = 128  # width of the vision features


class Layout(NamedTuple):
    """Samples of a batch, tokens before the image, tokens of the image."""

    name: str
    samples: int
    before: int
    image: int


LAYOUTS = (
    Layout("qwen2_base, SigLIP (729 tokens)", 2, 35, 729),
    Layout("qwen2_base, CLIP (576 tokens)", 2, 35, 576),
    Layout("qwen2_base, LDPv2 (144 tokens)", 8, 35, 144),
    Layout("qwen2_instruct, CLIP (576 tokens)", 2, 14, 576),
    Layout("system prompt of 200 tokens, CLIP", 2, 200, 576),
)


def make_inputs(layout: Layout) -> tuple[Tensor, ...]:
    """Make what `switch_states` takes: features, ids, mask, rows."""
    length = layout.before + layout.image + AFTER + ANSWER
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (layout.samples, length), generator=generator)
    ids[:, : layout.before] = ids[:1, : layout.before].clone()
    ids[:, layout.before : layout.before + layout.image] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    for row in range(layout.samples):
        mask[row, length - row * ANSWER // (2 * layout.samples) :] = 0
    rows = mask.bool()
    rows[:, : length - ANSWER - 1] = False
    rows[:, -1] = False
    features = torch.randn(layout.samples, layout.image, FEATURES, generator=generator, requires_grad=True)
    return features, ids, mask, rows


def main() -> None:
    """Print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=7)
    repeats = arguments.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = freeze(make_model(512, 6, LlavaWithoutVision))
    print("| layout | before the image | less time, kept | less time, new | FLOP, kept |\n| --- |" + " ---: |" * 4)
    for layout in LAYOUTS:
        inputs, kept = make_inputs(layout), SharedPrefixCache()

        def run(prefix_cache: Callable[[], SharedPrefixCache | None], inputs: tuple[Tensor, ...] = inputs) -> None:
            switch_states(teacher, *inputs, prefix_cache=prefix_cache()).sum().backward()

        ways = {
            "all": partial(run, lambda: None),
            "kept": partial(run, partial(lambda prefix_cache: prefix_cache, kept)),
            "new": partial(run, SharedPrefixCache),
        }
        flops = {}
        for name, way in ways.items():
            way()
            with FlopCounterMode(display=False) as counter:
                way()
            flops[name] = counter.get_total_flops()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                times[name].append(measure(way))
        middle = {name: statistics.median(found) for name, found in times.items()}
        share = layout.before / inputs[1].shape[1]
        print(
            f"| {layout.name} | {share:.1%} | {1 - middle['kept'] / middle['all']:.1%} | "
            f"{1 - middle['new'] / middle['all']:.1%} | {1 - flops['kept'] / flops['all']:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
