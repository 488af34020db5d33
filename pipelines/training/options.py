"""Options of `switchkd train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from switchkd.counting import counted
from switchkd.errors import ConfigError
from switchkd.pipelines.options import keyword_options_class, option
from switchkd.pipelines.training.option_checks import (
    PARTS,
    check_baseline,
    check_int8_teacher,
    check_lora,
    check_switch_ce,
    parts_of,
)
from switchkd.pipelines.training.option_groups.held_out import FREE, HeldOutOptions, check_held_out
from switchkd.pipelines.training.option_groups.lora import LoraOptions
from switchkd.pipelines.training.option_groups.step import StepOptions, check_step
from switchkd.pipelines.training.option_groups.weights import WeightOptions, check_weights
from switchkd.pipelines.training.trainer_entries import check_trainer_entries
from switchkd.settings import (
    MAX_SKIPPED,
    ImageMode,
    LoggerName,
    NormalizeBy,
    ObjectiveName,
    StoreLocation,
    TailPolicy,
    check_objective,
)

if TYPE_CHECKING:
    from switchkd.losses.objective import Objective

# Options that may differ when a run is resumed, since they do not change what is computed. How the global batch is composed
# (batch size, accumulation, processes) may change; the global batch may not.
RESUMABLE_CHANGES = {
    "student_checkpointing",
    "teacher_checkpointing",
    "packing",
    "log_every",
    "max_skipped",
    "save_every",
    "save_minutes",
    "workers",
    "output",
    "profile",
    "peak_tflops",
    "log_to",
    "batch_size",
    "accumulation",
    "keep",
} | FREE
# The names of transformers' schedulers (`transformers.trainer_utils.SchedulerType`; a test compares).
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
# Headings of the help, in its order.
FIRST = "Needed first"
DATA = "Data"
MODELS = "Models"
OBJECTIVE = "Objective"
OPTIMISATION = "Optimisation"
SCALE = "Scale"
LOGGING = "Logging and checkpoints"


@keyword_options_class
class TrainOptions(HeldOutOptions, LoraOptions, StepOptions, WeightOptions):
    """The options of `switchkd train`. Defaults follow LLaVA-KD's fine-tuning stage.

    Raises:
        ConfigError: an option violates its type or bounds, or two options exclude each other; no file was opened.
    """

    student: Path = option(
        names="checkpoint", group=FIRST, help="Checkpoint folder of the student, of any family of `switchkd models`."
    )
    data: Path = option(names="data", group=FIRST, help="The data file that was cached, or a mixture (YAML).")
    output: Path = option(group=FIRST, help="The run: checkpoints, options, losses, the trained student.")
    teacher: Path | None = option(
        names="checkpoint",
        default=None,
        group=FIRST,
        help="Checkpoint folder of the teacher; its vision tower is not read. With --stage pt, that of the stage to come: it is "
        "only compared with the student, before anything is trained.",
    )
    images: Path | None = option(
        names="images", default=None, group=DATA, help="Folder that the data file's image paths start from."
    )
    cache: StoreLocation | None = option(
        names="store",
        default=None,
        group=FIRST,
        help="A teacher store, or a folder of stores (or s3://…): the one that fits is taken.",
    )
    objective: ObjectiveName = option(
        default="dbild-rkl",
        group=OBJECTIVE,
        help="The divergence that Align and VSD measure; sft is CE alone. switch-ce: CE, and CE of the true answers on the switch "
        "pathway, without a store. llava-kd, align-kd, compodistill, align-ti-iva: other methods, --no-switch --teacher-mode live.",
    )
    attention_layer: int | None = option(
        default=None,
        at_least=0,
        group=OBJECTIVE,
        help="align-ti-iva: the layer of the teacher's LLM whose attention to the image weighs its tokens, counted from 0.",
        unset="the one that depends most on the instruction",
    )
    switch: bool | None = option(
        default=None,
        group=OBJECTIVE,
        help="Train the visual-switch pathway (VSD).",
        unset="on; off for families where it teaches nothing, see `switchkd models`",
    )
    align_weight: float = option(default=1.0, group=OBJECTIVE, help="λ1, the weight of Align.")
    vsd_weight: float = option(
        default=1.0, group=OBJECTIVE, help="λ2, the weight of VSD, or of the second CE of switch-ce."
    )
    switch_adapter: Literal["linear", "mlp"] | None = option(
        default=None,
        group=MODELS,
        help="Map the student's vision features to the teacher's width and number with one linear layer or an MLP "
        "of two, which train with it.",
    )
    vocab_map: bool = option(
        default=False,
        group=MODELS,
        help="The teacher has another tokenizer: compare entries and positions that stand for the same text.",
    )
    temperature: float | None = option(
        default=None,
        group=OBJECTIVE,
        help="τ, which divides the logits of Align and VSD.",
        unset="3 for (d)bild, 1 for fkl and rkl",
    )
    window: int | None = option(
        default=None,
        at_least=2,
        group=OBJECTIVE,
        help="Look for DBiLD's knee among this many leading logits.",
        unset="all",
    )
    mean: NormalizeBy = option(
        default="position",
        group=OBJECTIVE,
        help="Whether losses are means over all positions of the global batch, or over each sample's positions first and then over "
        "the samples.",
    )
    teacher_mode: Literal["cached", "live"] = option(
        default="cached",
        group=MODELS,
        help="live runs the whole teacher in every step instead of reading a store: the reference of a cached run.",
    )
    payload: Literal["topk", "hidden"] | None = option(
        default=None, group=DATA, help="Which payload of the store to train from.", unset="hidden if it is there"
    )
    tail: TailPolicy = option(
        default="student",
        group=OBJECTIVE,
        help="Teacher logits that a topk store does not hold: in the student's order with the teacher's mass, that mass spread "
        "evenly, or the smallest cached logit.",
    )
    template: str | None = option(default=None, group=DATA, help="Conversation template.", unset="the store's")
    image_mode: ImageMode | None = option(
        default=None,
        group=DATA,
        help="How images become square, for both models.",
        unset="the store's, without one the checkpoint's own",
    )
    max_pixels: int | None = option(
        default=None,
        at_least=1,
        group=DATA,
        help="Pixels that an image is resized or tiled to at most, where its size decides how many tokens it has.",
        unset="the store's, without one the checkpoint's own",
    )
    max_skipped: float = option(
        default=MAX_SKIPPED,
        at_least=0,
        at_most=1,
        group=DATA,
        help="Without a store: stop if more than this share of the samples cannot be used; see `cache-teacher`.",
    )
    max_length: int | None = option(
        default=None,
        at_least=2,
        group=DATA,
        help="Longer samples are skipped; in tokens, image tokens included.",
        unset="the store's",
    )
    epochs: float = option(default=1.0, above=0, group=OPTIMISATION, help="Passes over the data.")
    steps: int | None = option(
        default=None, at_least=1, group=OPTIMISATION, help="Optimizer steps; overrides --epochs."
    )
    batch_size: int = option(default=16, at_least=1, group=SCALE, help="Samples per device and forward pass.")
    accumulation: int | None = option(
        default=None,
        at_least=1,
        group=SCALE,
        help="Forward passes per optimizer step.",
        unset="1, or as --global-batch asks",
    )
    global_batch: int | None = option(
        default=None, at_least=1, group=OPTIMISATION, help="Samples per optimizer step over all devices."
    )
    stage: Literal["pt", "dpt", "sft", "dft"] | None = option(
        default=None,
        group=OPTIMISATION,
        help="Take the paper's settings of a training stage for whatever is not given: pre-training on captions (pt; dpt: "
        "distilled), which moves the projector alone, or fine-tuning of the whole student (sft; dft: distilled).",
    )
    train_parts: str = option(
        default=",".join(PARTS),
        group=MODELS,
        help="Parts of the student that train; the others stay as they are.",
    )
    group_by: Literal["none", "length", "modality-length"] | None = option(
        default=None,
        group=SCALE,
        unset="modality-length where that saves 5 % of the tokens or more, over 50 steps an epoch or more, without --packing; else "
        "none; a begun run keeps its own",
        help="Which samples share a batch: any; those of similar length; or those of similar length, image samples and text-only "
        "samples apart.",
    )
    packing: int | None = option(
        default=None,
        at_least=2,
        group=SCALE,
        metavar="TOKENS",
        help="Put the samples of a batch into rows of up to this many tokens; each sample attends to itself "
        "alone. Less padding, the "
        "same losses.",
        unset="one sample a row",
    )
    lr: float = option(default=2e-5, above=0, group=OPTIMISATION, help="Peak learning rate.")
    lr_vision: float | None = option(
        default=None, above=0, group=OPTIMISATION, help="Of the vision tower.", unset="--lr"
    )
    lr_projector: float | None = option(
        default=None, above=0, group=OPTIMISATION, help="Of the projector.", unset="--lr"
    )
    lr_language: float | None = option(default=None, above=0, group=OPTIMISATION, help="Of the LLM.", unset="--lr")
    warmup: float = option(default=0.03, at_least=0, at_most=1, group=OPTIMISATION, help="Share of the steps.")
    schedule: Schedule = option(default="cosine", group=OPTIMISATION, help="A scheduler of transformers.")
    weight_decay: float = option(default=0.0, group=OPTIMISATION, help="Of AdamW.")
    grad_clip: float = option(default=1.0, group=OPTIMISATION, help="Largest norm of the gradient.")
    profile: Literal["ddp", "fsdp", "zero3"] = option(
        default="ddp",
        group=SCALE,
        help="Under torchrun: whole models in every process; sharded by FSDP2; sharded by DeepSpeed.",
    )
    precision: Literal["float32", "bfloat16", "bfloat16-copies"] | None = option(
        default=None,
        group=SCALE,
        help="bfloat16: autocast over float32 weights; bfloat16-copies: everything in bfloat16, with copies of the float32 "
        "weights that are made once a step.",
        unset="bfloat16 on a GPU that computes in it, else float32; a begun run keeps its own",
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = option(
        default="auto",
        group=SCALE,
        help="The dtype of the frozen teacher's weights; auto: bfloat16 under --precision bfloat16, else as the "
        "checkpoint has them; "
        "int8: the layers of its LLM, everything else as auto.",
    )
    student_checkpointing: bool = option(
        default=False,
        group=SCALE,
        help="Recompute the student's activations in the backward pass: less memory, a third more time.",
    )
    teacher_checkpointing: bool = option(
        default=False,
        group=SCALE,
        help="The same for the frozen teacher on the switch pathway: half as much time again.",
    )
    seed: int = option(default=42, group=OPTIMISATION, help="Of the order of samples and of new weights.")
    log_every: int = option(default=10, at_least=1, group=LOGGING, help="Steps between two lines of the log.")
    peak_tflops: float | None = option(
        default=None,
        above=0,
        group=LOGGING,
        help="TFLOP/s that one device can do at this precision; MFU is reported relative to it.",
    )
    log_to: tuple[LoggerName, ...] = option(
        default=(),
        multiple=True,
        group=LOGGING,
        help="Also send the metrics there, with the run's options and the store's fingerprint; may be repeated.",
    )
    save_every: int = option(default=500, at_least=1, group=LOGGING, help="Steps between two checkpoints.")
    save_minutes: float | None = option(
        default=None,
        above=0,
        group=LOGGING,
        help="Also save a checkpoint after the first step that ends this many minutes after the last one.",
        unset="by steps alone",
    )
    keep: int = option(default=2, at_least=1, group=LOGGING, help="Checkpoints that are kept, the newest ones.")
    workers: int | None = option(
        default=None,
        at_least=0,
        group=SCALE,
        help="DataLoader processes of each training process.",
        unset="from the cores there are: 0 where a training process has fewer than 4, at most 8",
    )
    trust_remote_code: bool = option(default=False, group=MODELS, help="Run code that comes with a checkpoint.")
    trainer: dict[str, Any] = option(
        default={},
        hidden=True,
        help="Further arguments of transformers.TrainingArguments, in a config file only.",
    )

    def __post_init__(self) -> None:
        check_objective(
            self.objective, self.switch is not False, self.temperature, self.window, self.mean, self.weight_by
        )
        check_trainer_entries(self.trainer)
        check_lora(self, self.as_parts())
        check_baseline(self)
        check_switch_ce(self)
        check_weights(self)
        check_int8_teacher(self)
        check_step(self)
        check_held_out(
            self,
            objective=self.objective,
            switch=self.switch,
            cached=self.teacher_mode == "cached",
            profile=self.profile,
        )

    def as_objective(self) -> "Objective":
        """Return the objective."""
        from switchkd.losses.objective import Objective

        return Objective(
            self.objective,
            self.switch is not False,  # None until `inputs.resolve_options` asks the student's family
            self.align_weight,
            self.vsd_weight,
            self.temperature,
            self.window,
            self.mean,
            self.weight_by,
        )

    def as_parts(self) -> frozenset[str]:
        """Return the parts of the student that train.

        Raises:
            ConfigError: an unknown part, a learning rate for a frozen part, or a switch pathway without a trainable vision tower.
        """
        parts = parts_of(self.train_parts)
        if idle := [part for part in self.part_rates() if part not in parts]:
            raise ConfigError(f"--lr-{idle[0]} is given, but --train-parts {self.train_parts} leaves {idle[0]} frozen")
        if self.switch_adapter is not None and self.switch is False:
            raise ConfigError("--switch-adapter belongs to the switch pathway: leave it out, or pass --switch")
        if self.switch is not False and "vision" not in parts:
            raise ConfigError(
                "the switch pathway teaches the vision tower alone: add vision to --train-parts, or pass --no-switch"
            )
        return parts

    @property
    def in_bfloat16(self) -> bool:
        """Whether the models compute in bfloat16."""
        return self.precision in ("bfloat16", "bfloat16-copies")

    def part_rates(self) -> dict[str, float]:
        """Return the peak learning rates of the parts that have their own."""
        rates = {part: getattr(self, f"lr_{part}") for part in PARTS}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def accumulated(self, processes: int) -> int:
        """Return the forward passes per optimizer step of `processes` devices. Raises ConfigError if the batches do not fit."""
        if self.global_batch is None:
            return 1 if self.accumulation is None else self.accumulation
        if self.accumulation is not None:
            raise ConfigError("--global-batch and --accumulation say the same thing twice: pass one of them")
        at_once = self.batch_size * processes
        if self.global_batch % at_once:
            raise ConfigError(
                f"a global batch of {counted(self.global_batch, 'sample')} cannot be made of "
                f"{counted(processes, 'device')} x {counted(self.batch_size, 'sample')}: "
                "choose a --batch-size that divides it, or pass --accumulation"
            )
        return self.global_batch // at_once
