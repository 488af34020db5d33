"""What capture adds to the teacher's own forward pass with transformers on a CPU, part by part.

    make bench-capture            # python benchmarks/capture.py; writes docs/capture-table.md

SmolLM2-135M (real_teacher.py; width 576, 30 layers, V = 49,152), float32, one thread, one window of 512 tokens of real text. Of
these, 90 positions are supervised, as many as an answer of Mix-665K has. CPU time of a forked process; rounds alternate between
the ways, medians of the rounds.

The *bare forward pass* is the model without its LM head. The *LM head* makes the logits at the supervised positions, which no way
of reading a teacher's output can do without. *Packing* is what is ours: selection, knee, statistics, and the arrays that leave
the device. How fast a store encodes and writes them is in payloads-table.md.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from real_teacher import load_model
from side_by_side import measure
from torch import Tensor

from switchkd.losses.lm_head import LMHead
from switchkd.pipelines.capture.backends.packed_rows import pack, unpack

TOKENS, POSITIONS, TOP_K = 512, 90, 128
PAYLOADS = {"`topk`": (TOP_K, False), "`hidden`": (0, True), "`both`": (TOP_K, True)}  # (k, whether states are kept)


def main() -> None:
    """Measure and write the table."""
    from pydoc_data.topics import topics

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/capture-table.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]])
    head = LMHead(model.lm_head.weight.detach())

    @torch.inference_mode()
    def forward() -> Tensor:
        states: Tensor = model.model(input_ids=ids).last_hidden_state[0, -POSITIONS:]
        return states

    states = forward().clone()

    @torch.inference_mode()
    def packed(top_k: int, keep_hidden: bool) -> object:
        return unpack(pack(states, head.logits, None, top_k, keep_hidden), top_k)

    ways: dict[str, Callable[[], object]] = {
        "forward": forward,
        "head": torch.inference_mode()(lambda: head.logits(states)),
    }
    ways |= {payload: partial(packed, *kept) for payload, kept in PAYLOADS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, work in ways.items():
            seconds[name].append(measure(work, warm_ups=1, repeats=3))
    ms = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
    lines = [
        f"SmolLM2-135M, float32, one thread, {TOKENS} tokens with {POSITIONS} supervised ones, V = {len(head.weight):,}; CPU time, "
        f"medians of {options.rounds} rounds; made by `make bench-capture`. The bare forward pass takes {ms['forward']:,.0f} ms.",
        "",
        "| payload | LM head, ms | packing, ms | LM head / forward | packing / forward | both / forward |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for payload in PAYLOADS:
        packing = ms[payload] - ms["head"]
        shares = [part / ms["forward"] for part in (ms["head"], packing, ms[payload])]
        lines.append(
            f"| {payload} | {ms['head']:.0f} | {packing:.1f} | " + " | ".join(f"{s:.1%}" for s in shares) + " |"
        )
    print("\n".join(lines))
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
