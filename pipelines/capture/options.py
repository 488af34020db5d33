"""Options of `switchkd cache-teacher` and `switchkd store audit`."""

from pathlib import Path, PurePosixPath
from typing import Any, Literal

from switchkd.errors import ConfigError
from switchkd.pipelines.mixture import require_folder_of_stores
from switchkd.pipelines.options import option, options_class
from switchkd.settings import (
    MAX_IMAGE_PIXELS,
    MAX_SKIPPED,
    HiddenDtype,
    ImageMode,
    ModelDtype,
    PayloadName,
    StoreLocation,
    TailPolicy,
    is_mixture,
)

# Headings of the help, in its order.
FIRST = "Needed first"
DATA = "Data"
PAYLOAD = "What is stored"
TEACHER = "Teacher"
SCALE = "Scale"

DEFAULT_PAYLOAD: PayloadName = "both"
DEFAULT_HIDDEN_DTYPE: HiddenDtype = "steps"

# Samples submitted at a time: for transformers one forward pass; vLLM makes its own batches from a queue.
BATCH_SIZES = {"transformers": 16, "vllm": 128}


@options_class
class CacheOptions:
    """The options of `switchkd cache-teacher`.

    Raises:
        ConfigError: an option violates its type or bounds, or two options exclude each other; no file was opened.
    """

    teacher: Path = option(
        names="checkpoint", group=FIRST, help="Checkpoint folder of the teacher, of any family of `switchkd models`."
    )
    data: Path = option(
        names="data",
        group=FIRST,
        help="Data file: LLaVA-style JSON or JSON Lines, parquet, Arrow; or a mixture of them (YAML).",
    )
    out: StoreLocation = option(
        group=FIRST,
        help="The store, NAME.zarr or s3://BUCKET/NAME.zarr; an unfinished one is continued. Of a mixture: "
        "the folder of its stores.",
    )
    images: Path | None = option(
        names="images", default=None, group=FIRST, help="Folder that the data file's image paths start from."
    )
    template: str | None = option(
        default=None,
        group=DATA,
        help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
        unset="qwen2_base for a LLaVA checkpoint, chat for other families",
    )
    backend: Literal["transformers", "vllm"] = option(
        default="transformers", group=TEACHER, help="What runs the teacher; vllm needs an environment of its own."
    )
    payload: PayloadName | None = option(
        default=None,
        group=FIRST,
        help="topk: the largest logits and the mass of the rest; hidden: the final hidden states, from which the teacher's LM head "
        "computes all logits; both: hidden for training, topk for reading without the teacher.",
        unset=f"{DEFAULT_PAYLOAD}, or that of the store at --out",
    )
    k: int = option(default=128, at_least=2, group=PAYLOAD, help="Logits kept per position.")
    fine: float = option(
        default=0.004,
        above=0,
        group=PAYLOAD,
        help="Quantisation step of a stored logit at probability 1; the step grows as the probability falls.",
    )
    coarse: float = option(
        default=0.125,
        above=0,
        group=PAYLOAD,
        help="Largest quantisation step of a stored logit; the error is at most half a step.",
    )
    hidden_dtype: HiddenDtype | None = option(
        default=None,
        group=PAYLOAD,
        help="How hidden states are stored: as integers, steps per feature that give the logits the error --hidden-error, or in "
        "half precision.",
        unset=f"{DEFAULT_HIDDEN_DTYPE}, or that of the store at --out",
    )
    hidden_error: float = option(
        default=0.02,
        above=0,
        group=PAYLOAD,
        help="With --hidden-dtype steps, the root-mean-square error of a logit; halving it costs one bit a feature. "
        "0.01 is fine, 0.04 is small.",
    )
    visual_advantage: bool = option(
        default=False,
        group=PAYLOAD,
        help="Also store log p(token | image) - log p(token | blurred image) of every supervised token, which `train --weight-by "
        "visual-advantage` reads: the teacher runs a second time, over blurred images.",
    )
    part_size: int = option(
        default=512, at_least=1, group=PAYLOAD, help="Samples per part, the unit of work and resume."
    )
    batch_size: int = option(
        default=16,
        at_least=1,
        group=SCALE,
        help="Samples per forward pass; with vLLM, which makes its own batches, samples handed over at a time.",
        unset="; ".join(map(str, BATCH_SIZES.values())),
    )
    max_length: int = option(
        default=2048, at_least=2, group=DATA, help="Longer samples are skipped; in tokens, image tokens included."
    )
    image_mode: ImageMode = option(
        default="own",
        group=DATA,
        help="How images become square: as the checkpoint says, resized whatever the shape, or filled up with the mean colour.",
    )
    max_pixels: int | None = option(
        default=None,
        at_least=1,
        group=DATA,
        help="Pixels that an image is resized or tiled to at most, where its size decides how many tokens it has.",
        unset="the checkpoint's own",
    )
    max_image_pixels: int = option(
        default=MAX_IMAGE_PIXELS, at_least=1, group=DATA, help="Larger images are skipped undecoded."
    )
    # With Ray also "auto": the device that Ray assigns to an actor.
    device: str = option(
        default="cpu", group=TEACHER, help="cpu, cuda, cuda:1, …; not for vllm.", unset="cuda if there is one"
    )
    tensor_parallel: int = option(default=1, at_least=1, group=SCALE, help="Devices that share one teacher; vllm only.")
    vllm_options: tuple[tuple[str, Any], ...] = option(
        default=(),
        group=TEACHER,
        metavar="NAME=VALUE",
        flag="--vllm-option",
        multiple=True,
        help="Further argument of vLLM's engine, as in gpu_memory_utilization=0.8; may be repeated.",
    )
    check: int | None = option(
        default=None,
        at_least=0,
        group=TEACHER,
        metavar="N",
        help="With --backend vllm: compare the final states of the first N samples with those of transformers, which runs the "
        "teacher once before.",
        unset="1 for the first worker of a store without parts, if the teacher fits into one device; else 0",
    )
    dtype: ModelDtype = option(
        default="auto", group=TEACHER, help="The dtype that the teacher runs in; auto is the checkpoint's own."
    )
    workers: int | None = option(
        default=None,
        at_least=0,
        group=SCALE,
        help="Processes that read and decode images.",
        unset="from the cores there are: 0 where a process with a model has fewer than 4, at most 8; 0 with vLLM and Ray",
    )
    shard: tuple[int, int] = option(
        default=(0, 1),
        group=SCALE,
        metavar="I/N",
        help="Write parts I, I+N, …; else Slurm's array variables, then RANK and WORLD_SIZE.",
        unset="",
    )
    engine: Literal["local", "ray"] = option(
        default="local", group=SCALE, help="Where workers run: local is this process; ray starts one for each device."
    )
    actors: int | None = option(
        default=None, at_least=1, group=SCALE, help="Workers that Ray starts.", unset="one a device"
    )
    strict: bool = option(
        default=False,
        group=DATA,
        help="Stop at the first sample that cannot be used instead of recording a skip.",
    )
    max_skipped: float = option(
        default=MAX_SKIPPED,
        at_least=0,
        at_most=1,
        group=DATA,
        help="Stop if more than this share of the data file's samples cannot be used (but 10 samples, or half of a small file, "
        "are always allowed); 1 never stops.",
    )
    retry_skipped: bool = option(
        default=False,
        group=DATA,
        help="Capture parts of the store anew where an image that was missing or unreadable can now be read.",
    )
    trust_remote_code: bool = option(default=False, group=TEACHER, help="Run code that comes with the checkpoint.")

    def __post_init__(self) -> None:
        index, count = self.shard
        if not 0 <= index < count:
            raise ConfigError(f"shard {index}/{count}: the first number runs from 0 to {count - 1}")
        if is_mixture(self.data):
            require_folder_of_stores(self.out, self.data)
        elif PurePosixPath(str(self.out)).suffix != ".zarr":
            raise ConfigError(f"a store's name ends in .zarr, got {self.out}")
        if not self.fine <= self.coarse:
            raise ConfigError(f"0 < fine <= coarse is needed, got fine = {self.fine:g}, coarse = {self.coarse:g}")
        if self.engine == "ray" and self.shard != (0, 1):
            raise ConfigError("--engine ray hands out the parts itself: leave out --shard")
        if self.actors is not None and self.engine != "ray":
            raise ConfigError("--actors is Ray's: add --engine ray")
        if self.visual_advantage and self.backend == "vllm":
            raise ConfigError(
                "--visual-advantage runs the teacher over blurred images, too, which --backend vllm does not: pass --backend "
                "transformers"
            )
        if self.backend != "vllm" and (self.tensor_parallel != 1 or self.vllm_options or self.check):
            raise ConfigError("--tensor-parallel, --vllm-option and --check are vLLM's: add --backend vllm")


@options_class
class AuditOptions:
    """The options of `switchkd store audit`."""

    store: StoreLocation = option(names="store", hidden=True, help="The store.")
    teacher: Path = option(names="checkpoint", help="Checkpoint folder of the teacher.")
    data: Path = option(names="data", help="The data file that was cached.")
    images: Path | None = option(
        names="images", default=None, help="Folder that the data file's image paths start from."
    )
    student: Path | None = option(
        names="checkpoint",
        default=None,
        help="Checkpoint folder of a student.",
        unset="the teacher's logits with noise, at three distances",
    )
    samples: int = option(default=64, at_least=1, flag="-n, --samples", help="Random samples.")
    positions: int = option(
        default=512, at_least=1, help="Random positions of these samples that are compared, at most."
    )
    own_precision: bool = option(
        default=True,
        help="Also run the teacher's weights in float32, to tell what its own dtype costs; takes their memory in float32.",
    )
    visual_advantage: bool = option(
        default=True,
        help="Also tell by how much the teacher looks: log p(answer | image) - log p(answer | blurred image), by kind of question.",
    )
    batch_size: int = option(default=8, at_least=1, help="Samples per forward pass.")
    tail: TailPolicy = option(default="student", hidden=True, help="See `switchkd train --tail`.")
    seed: int = option(default=0, help="Of the choice of samples.")
    device: str = option(default="cpu", help="cpu, cuda, cuda:1, …", unset="cuda if there is one")
    trust_remote_code: bool = option(default=False, help="Run code that comes with a checkpoint.")
