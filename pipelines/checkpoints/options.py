"""Options of `switchkd init-student` and `switchkd convert`."""

from pathlib import Path
from typing import Literal

from switchkd.pipelines.options import option, options_class
from switchkd.settings import LDPV2_GRID, ImageMode


@options_class
class InitOptions:
    """The options of `switchkd init-student`."""

    vision: Path = option(
        names="model folder",
        help="Folder of a vision tower (SigLIP, SigLIP2 of fixed resolution, CLIP), alone or with its text tower, or of a Llava "
        "whose tower is taken.",
    )
    language: Path = option(names="model folder", help="Folder of a causal language model (Qwen, Llama, SmolLM, …).")
    out: Path = option(help="The student; a new folder.")
    teacher: Path | None = option(
        names="checkpoint",
        default=None,
        help="Checkpoint folder of the teacher of a later stage: check first that the student can learn from it with the switch "
        "pathway.",
        unset="no check",
    )
    projector: Literal["mlp", "ldpv2"] = option(
        default="mlp",
        help="mlp: two layers with GELU, a token per feature. ldpv2: MobileVLM V2's, which pools to --grid² tokens.",
    )
    grid: int = option(default=LDPV2_GRID, at_least=1, help="Side of ldpv2's grid of tokens.")
    tokenizer: Path | None = option(
        names="model folder",
        default=None,
        help="Folder of the tokenizer to take, such as the teacher's; it must hold the LLM's with the same ids.",
        unset="the LLM's",
    )
    feature_layer: int = option(default=-2, help="Which layer's output of the tower is projected.")
    strategy: Literal["default", "full"] | None = option(
        default=None,
        help="default drops the first token, full keeps all.",
        unset="drop it if it is a class token",
    )
    image_mode: ImageMode = option(
        default="own",
        help="own: the tower's image processor. square: images are stretched. pad: filled up with the mean colour first.",
    )
    seed: int = option(default=42, help="Of the projector's weights.")
    trust_remote_code: bool = option(default=False, help="Run code that comes with a checkpoint.")


@options_class
class ConvertOptions:
    """The options of `switchkd convert`."""

    source: Path = option(names="model folder", hidden=True, help="The checkpoint.")
    target: Path = option(hidden=True, help="A new folder.")
    to: Literal["hf", "tinyllava", "llava"] = option(
        default="hf",
        help="Layout of TARGET: transformers' and switchkd's, TinyLLaVA's and LLaVA-KD's, or original LLaVA's.",
    )
    vision: Path | None = option(
        names="model folder",
        default=None,
        help="Folder of the vision tower, where SOURCE only names it.",
        unset="SOURCE/vision_tower, if it is there",
    )
    tokenizer: Path | None = option(names="model folder", default=None, help="Folder of the tokenizer.", unset="SOURCE")
    strategy: Literal["default", "full"] | None = option(
        default=None, help="default drops an image's first feature, full keeps all.", unset="what SOURCE says"
    )
