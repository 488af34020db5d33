"""Opens model folders without loading weights, and checks that a teacher and a student are compatible."""

import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, LlavaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from switchkd.collector import without_collection
from switchkd.counting import counted
from switchkd.errors import CheckpointError, ConfigError
from switchkd.fingerprints import hash_config, hash_tokenizer, hash_weights
from switchkd.library_errors import as_checkpoint_error
from switchkd.models.check_config import MAX_IMAGE_TOKENS, check_config, check_feature_layers, check_image_token
from switchkd.models.families import FAMILIES, family_of, logit_map_of
from switchkd.models.fit import check_cuts
from switchkd.models.image_size import limit_pixels
from switchkd.models.projectors import (
    SwitchLlavaConfig,
    image_token_count,
)
from switchkd.printable import printable
from switchkd.settings import ImageMode
from switchkd.waits import Waiting

CONFIGS = {kind.model_type: kind for kind in (LlavaConfig, SwitchLlavaConfig)}


def token_rows(tokenizer: Any) -> int:
    """Return the number of embedding rows that a tokenizer's ids need: the largest id + 1.

    Ids may have holes, which `len(tokenizer)` does not count: its last tokens would then lie outside.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, opened but not loaded: config, tokenizer, image processor and the sizes that must be compatible."""

    path: Path
    config: Any  # of a family of `families.FAMILIES`
    tokenizer: Any
    image_processor: Any
    image_tokens: int  # tokens per image; 0 where they depend on the image, in every family but Llava
    feature_tokens: int  # n, features that enter the projector; more than image_tokens if it pools them; 0 likewise
    feature_width: int  # d_v, their width; 0 likewise
    trust_remote_code: bool = False

    @property
    def vocab_rows(self) -> int:
        """N: rows in use, see `token_rows`; a model's embedding may be padded beyond it."""
        rows: int = min(self._token_rows, self.config.text_config.vocab_size)
        return rows

    @cached_property
    def _token_rows(self) -> int:
        return token_rows(self.tokenizer)

    @cached_property
    def tokenizer_hash(self) -> str:
        """See `hash_tokenizer`; the tokenizer of a checkpoint does not change."""
        return hash_tokenizer(self.tokenizer)

    @cached_property
    def _known_hashes(self) -> dict[tuple[str, ...], dict[str, str]]:
        return {}

    def hash_weights(self, components: tuple[str, ...]) -> dict[str, str]:
        """See `fingerprints.hash_weights`; the files are read once, however many stores are compared with this teacher."""
        if components not in self._known_hashes:
            self._known_hashes[components] = hash_weights(self.path, components)
        return self._known_hashes[components]

    @property
    def image_token_id(self) -> int:
        """Id of the token that an image's features replace."""
        token: int = self.config.image_token_id
        return token

    @property
    def quantization(self) -> str | None:
        """How its weights are quantised, by transformers' name of the method ("fp8", "awq", …); None if they are not."""
        settings = getattr(self.config, "quantization_config", None)
        if settings is None:
            return None
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        return str(getattr(method, "value", method))

    def require_whole_weights(self, remedy: str) -> None:
        """Raise CheckpointError, with a remedy, if the weights are quantised, which is tested with vLLM alone."""
        if self.quantization is not None:
            raise CheckpointError(
                f"{self.path} has quantised weights ({self.quantization}), which only `cache-teacher --backend vllm` runs: {remedy}"
            )

    def resolve_dtype(self, dtype: str) -> str:
        """Return the dtype that "auto" stands for, or `dtype` itself."""
        if dtype != "auto":
            return dtype
        saved = self.config.dtype or self.config.text_config.dtype or torch.float32
        return str(saved).removeprefix("torch.")


def open_checkpoint(path: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open a checkpoint folder of any family without loading weights.

    Raises:
        CheckpointError: no such folder, a model of no family here, logits that depend on the program that computes them, no fast
            tokenizer, no image processor, or a file that is damaged or of a kind that does not fit the others.
        ReadFailure: a file could not be read now.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no checkpoint at {folder}: expected a folder with a config.json")
    with as_checkpoint_error(folder), Waiting(f"opening {printable(folder)}"):
        # transformers reads nothing where it is not an object.
        saved: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = saved.get("model_type") if isinstance(saved, dict) else None
        if isinstance(saved, dict) and ("mm_projector_type" in saved or found == "tinyllava"):
            raise CheckpointError(  # original LLaVA's model type is also "llava"
                f"{folder} is a {found!r} model in the layout of TinyLLaVA or original LLaVA; expected a checkpoint as "
                "transformers saves it: `switchkd convert` makes one"
            )
        if isinstance(saved, dict) and not isinstance(found, str):
            raise CheckpointError(f"{folder} is a {found!r} model; expected one of {', '.join(FAMILIES)}")
        if isinstance(found, str) and found not in FAMILIES and found not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{folder} is a {found!r} model, which transformers {transformers.__version__} does not know: take a checkpoint of "
                f"a family of `switchkd models`, or update transformers. Supported: {', '.join(FAMILIES)}"
            )
        check_config(saved, folder, llava=found in CONFIGS)
        config = AutoConfig.from_pretrained(folder)
        family = family_of(config, folder)
        logit_map_of(config, folder)
        with without_collection():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES):
            raise CheckpointError(
                f"{folder} has no image processor: {IMAGE_PROCESSOR_FILES[0]} is missing; copy it from the model's origin"
            )
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, **PIL_BACKEND)
        image_tokens = feature_tokens = feature_width = 0
        if family.is_llava:
            feature_tokens, feature_width = probe_vision(config, folder)
            image_tokens = image_token_count(config, feature_tokens)
            if not 1 <= image_tokens <= MAX_IMAGE_TOKENS:
                raise CheckpointError(
                    f"{folder}: an image would become {counted(image_tokens, 'token')}, expected 1 to "
                    f"{MAX_IMAGE_TOKENS:,}: compare "
                    "image_size and patch_size of its vision_config with the tower's"
                )
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(f"{folder} has a slow tokenizer; a tokenizer.json is needed")
        check_image_token(config.image_token_id, tokenizer, folder)
        tokenizer.encode("a", add_special_tokens=False)
        opened = Checkpoint(
            folder, config, tokenizer, processor, image_tokens, feature_tokens, feature_width, trust_remote_code
        )
        opened.tokenizer_hash  # noqa: B018 - reads everything that is used of it later
    return opened


IMAGE_MODES: tuple[str, ...] = get_args(ImageMode)


def with_image_mode(checkpoint: Checkpoint, mode: str, max_pixels: int | None = None) -> Checkpoint:
    """Return the checkpoint with its image processor in another image mode, and with a limit on pixels.

    Args:
        mode: see `processor_in_mode`. max_pixels: see `image_size.limit_pixels`; None leaves the checkpoint's own.

    Raises:
        ConfigError: the family keeps the shape of images, or all of them have the same size.
    """
    family = family_of(checkpoint.config)
    if mode != "own" and not family.is_llava:
        raise ConfigError(
            f"--image-mode {mode} makes images square for a Llava; {checkpoint.path} is a {checkpoint.config.model_type}, whose "
            "processor keeps their shape: pass --image-mode own"
        )
    if max_pixels is not None:
        limited = limit_pixels(checkpoint.image_processor, family, max_pixels, checkpoint.path)
        checkpoint = replace(checkpoint, image_processor=limited)
    side = getattr(checkpoint.config.vision_config, "image_size", 0)
    processor = processor_in_mode(checkpoint.image_processor, mode, side, checkpoint.path)
    return checkpoint if mode == "own" else replace(checkpoint, image_processor=processor)


def processor_in_mode(processor: Any, mode: str, side: int, path: Path) -> Any:
    """Return an image processor in another image mode, which decides how images are made square.

    Args:
        mode: "own", the image processor unchanged; "square", resized to the tower's size without cropping, whatever the aspect
            ratio; "pad", first padded to a square with the processor's mean colour, as LLaVA 1.5 does (with transformers' Llava
            image processor, so that a saved checkpoint opens without switchkd).
        side: the tower's size, in pixels. path: of the checkpoint, for the error.

    Raises:
        CheckpointError: the image processor has no mean colour.
    """
    if mode not in IMAGE_MODES:
        raise ConfigError(f"image mode is one of {', '.join(IMAGE_MODES)}, got {mode!r}")
    if mode == "own":
        return processor
    settings = processor.to_dict()
    settings |= {"size": {"height": side, "width": side}, "do_resize": True, "do_center_crop": False}
    kind: Any = type(processor)
    if mode == "pad":
        if not settings.get("image_mean"):
            raise CheckpointError(f"{path}: its image processor has no mean colour to fill images up with")
        kind = LlavaImageProcessorPil
        names = (
            "do_rescale",
            "rescale_factor",
            "do_normalize",
            "image_mean",
            "image_std",
            "resample",
            "do_convert_rgb",
        )
        shape = {name: settings[name] for name in ("size", "do_resize", "do_center_crop")}
        settings = shape | {name: settings[name] for name in names if name in settings} | {"do_pad": True}
    return kind.from_dict(settings)


def teacher_identity(checkpoint: Checkpoint, vision: bool = True) -> dict[str, str]:
    """Return the hashes that identify a teacher: config, and each component's weights; and what it makes of its LM head's output.

    The latter, "logit_map", is there only where the logits are not the LM head's product.

    Args:
        vision: if False, the vision tower's weights are not read, and its hash is left out.
    """
    components = ("vision", "projector", "language") if vision else ("projector", "language")
    logit_map = logit_map_of(checkpoint.config, checkpoint.path)
    found = {} if logit_map.is_identity else {"logit_map": str(logit_map)}
    return found | {"config": hash_config(checkpoint.config.to_dict())} | checkpoint.hash_weights(components)


IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # one of which describes it
# What a processor is made of beside tokenizer and image processor.
PROCESSOR_FILES = (
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ProcessorFiles:
    """The files of a checkpoint's processor, which a student keeps; a Llava's processor is made anew at its export."""

    folder: Path

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy them; the name is that of transformers' processors, beside which they are saved."""
        for name in PROCESSOR_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)
        saved = Path(folder) / PROCESSOR_FILES[0]
        if saved.is_file():  # the image processor is saved beside it, perhaps with other settings
            content = json.loads(saved.read_text(encoding="utf-8"))
            content.pop("image_processor", None)
            saved.write_text(json.dumps(content, indent=2), encoding="utf-8")


def readers_of(checkpoint: Checkpoint) -> list[Any]:
    """Return what reads text and images, each with `save_pretrained`: tokenizer, image processor, files of the processor."""
    readers = [checkpoint.tokenizer, checkpoint.image_processor]
    return readers if family_of(checkpoint.config).is_llava else [*readers, ProcessorFiles(checkpoint.path)]


# torchvision may be missing or broken, and its pixels differ from Pillow's in the last bits, so the Pillow backend is always used.
PIL_BACKEND = {"backend": "pil"}


def probe_vision(config: LlavaConfig, path: Path | str = "the model") -> tuple[int, int]:
    """Return (number, width) of the features that a Llava's vision tower passes to the projector, without its weights.

    The tower runs on the meta device, so the result is exact for any tower that transformers supports.

    Args:
        path: of the checkpoint, for the error.

    Raises:
        CheckpointError: the feature layer does not exist.
        ValueError: the tower's input is not a plain image (SigLIP2 NaFlex).
    """
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(config.vision_config).eval()
        if "spatial_shapes" in inspect.signature(tower.forward).parameters:
            raise ValueError(
                f"a {config.vision_config.model_type} takes patches and their grid; Llava hands it plain images. Take a tower "
                "of fixed resolution (SigLIP2's are of type siglip_vision_model)"
            )
        states = tower(blank_image(config).to(tower.dtype), output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    check_feature_layers(layers, len(states), path)
    layers = [layers] if isinstance(layers, int) else layers
    tokens = states[layers[0]].shape[1] - (config.vision_feature_select_strategy == "default")
    return tokens, sum(states[layer].shape[-1] for layer in layers)


def blank_image(config: LlavaConfig) -> Tensor:
    """Return one image of zeros in the input size of a Llava's vision tower, [1, 3, H, W] float32."""
    vision = config.vision_config
    return torch.zeros(1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)


def check_compatible(
    teacher: Checkpoint,
    student: Checkpoint,
    switch: bool,
    adapter: bool = False,
    one_text: bool = False,
    vocab_map: bool = False,
    media: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> None:
    """Check that a student can learn from a teacher.

    Both pathways need the same tokenizer and image token id. The switch pathway also needs features of the same width and number,
    since the teacher's projector reads the student's features.

    Args:
        adapter: whether a switch adapter maps the features, so that their width and number may differ.
        one_text: whether both read the same ids, image tokens included, even without the switch pathway.
        vocab_map: whether a vocabulary map is used, so that the tokenizers may differ.
        media: of one image, as the teacher's and the student's processor make it; needed for the switch pathway of other families
            than Llava.

    Raises:
        CheckpointError: names both values of the first property that does not match.
    """
    sides = f"teacher {teacher.path}, student {student.path}"
    if not vocab_map and teacher.tokenizer_hash != student.tokenizer_hash:
        raise CheckpointError(
            f"the tokenizers differ ({len(teacher.tokenizer)} and {len(student.tokenizer)} entries): {sides}. "
            "Logits can only be compared over one vocabulary; give both models the same tokenizer, or pass --vocab-map"
        )
    if not vocab_map and teacher.image_token_id != student.image_token_id:
        raise CheckpointError(
            f"the image token ids differ ({teacher.image_token_id} and {student.image_token_id}): {sides}"
        )
    check_student(student)
    if switch and not all(family_of(side.config).is_llava for side in (teacher, student)):
        assert media is not None
        ends = [(side.path, side.config, image) for side, image in zip((teacher, student), media, strict=True)]
        check_cuts(ends[0], ends[1], adapter)
        return
    switch = switch and not adapter
    advice = "--switch-adapter linear, or --no-switch" if switch else "another teacher"
    if (switch or one_text) and teacher.image_tokens != student.image_tokens:
        raise CheckpointError(
            f"an image becomes {counted(teacher.image_tokens, 'token')} for the teacher and {student.image_tokens} "
            "for the student: "
            f"{sides}. Choose a tower with the same number of patches, {advice}"
        )
    if switch and teacher.feature_tokens != student.feature_tokens:
        raise CheckpointError(
            f"the switch pathway feeds the student's {student.feature_tokens} vision features to the teacher's projector, which "
            f"takes {teacher.feature_tokens}: {sides}. Choose a tower with the teacher's number of patches, {advice}"
        )
    if switch and teacher.feature_width != student.feature_width:
        raise CheckpointError(
            f"the switch pathway feeds the student's vision features (width {student.feature_width}) to the teacher's "
            f"projector (width {teacher.feature_width}): {sides}. Choose a tower of the teacher's width, {advice}"
        )


def check_student(student: Checkpoint) -> None:
    """Refuse a model that can only be a teacher. Raises CheckpointError."""
    if family_of(student.config, student.path).teaches_only:
        raise CheckpointError(
            f"{student.path} is a {student.config.model_type}, which only teaches here: take a dense model as the student"
        )
