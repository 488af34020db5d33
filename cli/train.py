"""`switchkd train`: stage two."""

import logging
import os
from typing import Any

import click
from click.core import ParameterSource

from switchkd.cli.common import PATH, STORE, config_option, lines_of, quiet_libraries


@click.command("train")
@config_option
@click.option(
    "--stage",
    type=click.Choice(["pt", "dpt", "sft", "dft"]),
    help="Take the paper's settings of a stage for whatever is not given: pre-training on captions (pt; dpt: distilled), which "
    "moves the projector alone, or fine-tuning of the whole student (sft; dft: distilled).",
)
@click.option("--teacher", type=PATH, help="Checkpoint folder of the teacher; its vision tower is not read.")
@click.option("--student", type=PATH, required=True, help="Checkpoint folder of the student (a Llava).")
@click.option("--data", type=PATH, required=True, help="The data file that was cached.")
@click.option("--images", type=PATH, help="Folder that the data file's image paths start from.")
@click.option(
    "--cache", type=STORE, help="A teacher store, or a folder of stores (or s3://…): the one that fits is taken."
)
@click.option("--output", type=PATH, required=True, help="The run: checkpoints, options, losses, the trained student.")
@click.option(
    "--objective",
    type=click.Choice(["sft", "fkl", "rkl", "bild-fkl", "bild-rkl", "dbild-fkl", "dbild-rkl", "llava-kd", "align-kd"]),
    default="dbild-rkl",
    show_default=True,
    help="What Align and VSD measure; sft is CE alone. llava-kd and align-kd are other methods: --no-switch --teacher-mode live.",
)
@click.option("--switch/--no-switch", default=True, show_default=True, help="Train the visual-switch pathway (VSD).")
@click.option("--align-weight", type=float, default=1.0, show_default=True, help="λ1.")
@click.option("--vsd-weight", type=float, default=1.0, show_default=True, help="λ2.")
@click.option(
    "--switch-adapter",
    type=click.Choice(["linear", "mlp"]),
    help="Map the student's vision features to the teacher's width and number with a layer, or two, that train along.",
)
@click.option(
    "--vocab-map",
    is_flag=True,
    help="The teacher has another tokenizer: compare entries and positions that stand for the same text.",
)
@click.option("--temperature", type=float, help="τ.  [default: 3 for (d)bild, 1 for fkl and rkl]")
@click.option(
    "--window", type=click.IntRange(2), help="Look for DBiLD's knee among this many leading logits.  [default: all]"
)
@click.option(
    "--mean",
    type=click.Choice(["position", "sample"]),
    default="position",
    show_default=True,
    help="Over all positions of the global batch, or over each sample's positions first and then over the samples.",
)
@click.option(
    "--teacher-mode",
    type=click.Choice(["cached", "live"]),
    default="cached",
    show_default=True,
    help="live runs the whole teacher in every step instead of reading a store: the reference of a cached run.",
)
@click.option(
    "--payload",
    type=click.Choice(["topk", "hidden"]),
    help="Which payload of the store to train from.  [default: hidden if it is there]",
)
@click.option(
    "--tail",
    type=click.Choice(["student", "uniform", "floor"]),
    default="student",
    show_default=True,
    help="Teacher logits that a topk store does not hold: in the student's order with the teacher's mass, that mass spread "
    "evenly, or the smallest cached logit.",
)
@click.option("--template", help="Conversation template.  [default: the store's]")
@click.option(
    "--image-mode",
    type=click.Choice(["own", "square", "pad"]),
    help="How images become square, for both models.  [default: the store's, without one the checkpoint's own]",
)
@click.option("--max-length", type=click.IntRange(2), help="In tokens with image tokens.  [default: the store's]")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps; overrides --epochs.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Samples per device and forward pass."
)
@click.option(
    "--accumulation",
    type=click.IntRange(1),
    help="Forward passes per optimizer step.  [default: 1, or as --global-batch asks]",
)
@click.option("--global-batch", type=click.IntRange(1), help="Samples per optimizer step over all devices.")
@click.option(
    "--train-parts",
    default="vision,projector,language",
    show_default=True,
    help="Parts of the student that train; the others stay as they are.",
)
@click.option(
    "--group-by",
    type=click.Choice(["none", "length", "modality-length"]),
    default="none",
    show_default=True,
    help="Which samples share a batch: any, those of similar length, or so apart for image samples and text alone.",
)
@click.option(
    "--packing",
    type=click.IntRange(2),
    metavar="TOKENS",
    help="Put the samples of a batch into rows of up to this many tokens, each seen as if it were alone: less padding, "
    "none with rows longer than the batch; the same losses.  [default: one sample a row]",
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=2e-5, show_default=True, help="Peak learning rate."
)
@click.option("--lr-vision", type=click.FloatRange(0, min_open=True), help="Of the vision tower.  [default: --lr]")
@click.option("--lr-projector", type=click.FloatRange(0, min_open=True), help="Of the projector.  [default: --lr]")
@click.option("--lr-language", type=click.FloatRange(0, min_open=True), help="Of the LLM.  [default: --lr]")
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.03, show_default=True, help="Share of the steps.")
@click.option("--schedule", default="cosine", show_default=True, help="A scheduler of transformers.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--grad-clip", type=float, default=1.0, show_default=True, help="Largest norm of the gradient.")
@click.option(
    "--profile",
    type=click.Choice(["ddp", "fsdp", "zero3"]),
    default="ddp",
    show_default=True,
    help="Under torchrun: whole models in every process; sharded by FSDP2; sharded by DeepSpeed.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16: autocast over float32 weights.",
)
@click.option(
    "--teacher-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    show_default=True,
    help="What its frozen weights are kept in; auto: bfloat16 under --precision bfloat16, else as the checkpoint has them; int8: "
    "the layers of its LLM, the rest as auto.",
)
@click.option(
    "--student-checkpointing",
    is_flag=True,
    help="Recompute the student's activations in the backward pass: less memory, a third more of its time.",
)
@click.option(
    "--teacher-checkpointing",
    is_flag=True,
    help="The same for the frozen teacher on the switch pathway: half more of its time.",
)
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--log-every", type=click.IntRange(1), default=10, show_default=True, help="In steps.")
@click.option(
    "--peak-tflops",
    type=click.FloatRange(0, min_open=True),
    help="TFLOP/s that one device can do at this precision; MFU is told over it.",
)
@click.option("--save-every", type=click.IntRange(1), default=500, show_default=True, help="In steps.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="DataLoader processes.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a checkpoint.")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Train a student with CE + λ1·Align + λ2·VSD from a teacher store.

    Align reads the store; VSD sends the student's visual features through the teacher's projector and LLM. Run it again to
    continue after an interruption. Under torchrun it trains on all devices. A config file may hold `trainer:`, further
    arguments of transformers' TrainingArguments.
    """
    quiet_libraries()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, this one speaks
    if not first:
        logging.getLogger("switchkd").setLevel(logging.WARNING)
    from switchkd.pipelines.training.options import TrainOptions
    from switchkd.pipelines.training.stages import with_stage
    from switchkd.pipelines.training.train import train

    if options["stage"] is not None:
        given = {n: v for n, v in options.items() if ctx.get_parameter_source(n) is not ParameterSource.DEFAULT}
        options |= with_stage(options["stage"], given)
    trainer = ctx.obj["trainer"] if ctx.obj else {}
    done = train(TrainOptions(trainer=trainer, **options))
    if not first:
        return
    losses = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in done.losses.items())
    click.echo(
        f"{done.output}: {'was already trained for' if done.already_finished else 'trained for'} {done.steps} steps on "
        f"{done.samples:,} samples; skipped: {lines_of(done.skipped)}\nlast losses: {losses}"
    )
