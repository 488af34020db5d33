"""Conversion of checkpoints between the layouts of projects; if any tensor is unknown or missing, nothing is written."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoImageProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from switchkd.errors import CheckpointError, ConfigError
from switchkd.fingerprints import INDEX_FILE, SINGLE_FILE, weight_files
from switchkd.library_errors import as_checkpoint_error
from switchkd.models.checkpoint import PIL_BACKEND, open_checkpoint, probe_vision, processor_in_mode, token_rows
from switchkd.models.layouts import RECOMPUTED, config_from_hf, config_to_hf, from_hf, layout_of, to_hf
from switchkd.models.projectors import image_token_count, model_class
from switchkd.models.vlm import load_model
from switchkd.pipelines.checkpoints.options import ConvertOptions
from switchkd.pipelines.checkpoints.parts import (
    IMAGE_TOKEN,
    load_tower,
    read_vision_config,
    tokenizer_with_image,
)
from switchkd.pipelines.run_folder import write_atomically

# TinyLLaVA Factory keeps what was pre-trained in folders, one for each part: folder → what its tensors' names lack.
PARTS_OF_FACTORY = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
TOWER, LANGUAGE = "vision_tower", "language_model"  # folders beside the weights in layouts that name their parts
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertSummary:
    """The result of a conversion."""

    target: Path
    layout: str  # of the source
    tensors: int  # written
    parameters: int
    from_tower: int  # tensors missing in the source and read from its tower's folder
    dropped: list[str] = field(default_factory=list)  # buffers that are computed, and a tied LM head's copy
    new_rows: int = 0  # rows added to the embedding for <image>


@dataclass
class _Parts:
    model: LlavaForConditionalGeneration
    tokenizer: Any
    processor: Any
    from_tower: int = 0
    dropped: list[str] = field(default_factory=list)
    new_rows: int = 0


def convert(options: ConvertOptions) -> ConvertSummary:
    """Convert a checkpoint; the model's outputs stay the same.

    Raises:
        CheckpointError: unknown or missing tensors or wrong shapes, which are named, or a setting that the layout cannot represent.
        ConfigError: the target exists already, or its layout is the source's.
    """
    if options.target.exists() and any(options.target.iterdir()):
        raise ConfigError(f"{options.target} is not empty: pass another folder, nothing is overwritten")
    config = _read_config(options.source)
    layout = layout_of(config)
    if layout == options.to:
        raise ConfigError(f"{options.source} is in layout {layout} already")
    parts = _read_hf(options.source) if layout == "hf" else _read_other(options, config, layout)
    options.target.mkdir(parents=True, exist_ok=True)
    if options.to == "hf":
        parts.model.save_pretrained(options.target)
        parts.tokenizer.save_pretrained(options.target)
        parts.processor.save_pretrained(options.target)
    else:
        _write_other(options, parts)
    kept = _own_tensors(parts.model)
    return ConvertSummary(
        options.target,
        layout,
        len(kept),
        sum(tensor.numel() for tensor in kept.values()),
        parts.from_tower,
        parts.dropped,
        parts.new_rows,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {folder}: expected a folder with a config.json") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {error}") from None
    return config


def _read_hf(folder: Path) -> _Parts:
    opened = open_checkpoint(folder)
    return _Parts(load_model(opened), opened.tokenizer, opened.image_processor)


def _read_other(options: ConvertOptions, found: dict[str, Any], layout: str) -> _Parts:
    """Read a checkpoint of another layout into a Llava."""
    source = options.source
    tower_folder = options.vision or (source / TOWER if (source / TOWER).is_dir() else None)
    vision = None
    if layout == "llava":
        if tower_folder is None:
            raise CheckpointError(
                f"{source} names its vision tower ({found.get('mm_vision_tower')}) and does not describe it: "
                "pass the tower's folder as --vision"
            )
        vision = read_vision_config(tower_folder)
    tokenizer = tokenizer_with_image(options.tokenizer or source)
    with as_checkpoint_error(source):
        token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        config = config_to_hf(found, vision, token, options.strategy)
        config.image_seq_length = image_token_count(config, probe_vision(config)[0])
    processor = _processor(source, tower_folder, found.get("image_aspect_ratio"), config.vision_config.image_size)

    tensors, dropped = _translated(source, layout, config)
    if hasattr(config.vision_config, "vision_use_head"):  # SigLIP's pooling head, not used by Llava
        config.vision_config.vision_use_head = any(name.startswith("model.vision_tower.head.") for name in tensors)
    with torch.device("meta"):
        model = model_class(config)(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
        head = tensors.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, tensors["model.language_model.embed_tokens.weight"]):
            raise CheckpointError(f"{source} ties its LM head to the embedding, and holds two that differ")
        dropped += [] if head is None else ["lm_head.weight"]
    from_tower = 0
    if tower_folder is not None and not any("vision_tower" in name for name in tensors):
        weights = load_tower(tower_folder, config.vision_config).state_dict()
        dtype = next(iter(tensors.values())).dtype
        tensors |= {f"model.vision_tower.{name}": tensor.to(dtype) for name, tensor in weights.items()}
        from_tower = len(weights)
    _require_same(source, layout, config, tensors, wanted)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = model.dtype
    parts = _Parts(model, tokenizer, processor, from_tower, dropped)
    rows = config.text_config.vocab_size
    if token_rows(tokenizer) > rows:  # <image> needs its own row, whose value is never used
        torch.manual_seed(0)
        model.resize_token_embeddings(token_rows(tokenizer), pad_to_multiple_of=64)
        parts.new_rows = model.config.text_config.vocab_size - rows
    return parts


def _processor(source: Path, tower: Path | None, ratio: str | None, side: int) -> Any:
    """Find the image processor in the source, beside it or in the tower's folder, and configure it as the source's project does."""
    if ratio not in (None, "square", "pad"):
        raise CheckpointError(f"{source} cuts images into tiles (image_aspect_ratio {ratio!r}), which Llava does not")
    for folder in (source, tower):
        if folder is not None and (folder / "preprocessor_config.json").is_file():
            with as_checkpoint_error(folder):
                processor = AutoImageProcessor.from_pretrained(folder, **PIL_BACKEND)
            return processor_in_mode(processor, "pad" if ratio == "pad" else "own", side, folder)
    raise CheckpointError(f"{source} has no image processor: pass the vision tower's folder as --vision")


def _translated(source: Path, layout: str, config: LlavaConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Return a source's tensors under transformers' names, and the names of those that are not needed."""
    tensors: dict[str, Tensor] = {}
    dropped, unknown = [], []
    for name, tensor in _tensors(source):
        ours = to_hf(name, layout, config)
        if RECOMPUTED.search(name):
            dropped.append(name)
        elif ours is None:
            unknown.append(name)
        elif ours in tensors:
            raise CheckpointError(f"{source} holds {name} twice")
        else:
            tensors[ours] = tensor
    if unknown:
        raise CheckpointError(f"{source} holds {_named(unknown)} that layout {layout} does not have")
    return tensors, dropped


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint: from its safetensors files, or else from its pickles, restricted to plain tensors."""
    named = [name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()]
    if files := weight_files(folder) if named else sorted(folder.glob("*.safetensors")):
        for file in files:
            with as_checkpoint_error(folder), safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  not a dict
                    yield name, opened.get_tensor(name)
        return
    for file, prefix in _pickles(folder):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler may raise any error; anything except tensors is rejected
            raise CheckpointError(
                f"{file} holds more than tensors, or is damaged: {str(error).splitlines()[0]}"
            ) from None
        yield from ((prefix + name, tensor) for name, tensor in content.items())


def _pickles(folder: Path) -> list[tuple[Path, str]]:
    """Return the pickles of a checkpoint, each with what its tensors' names lack. Raises CheckpointError if there are none."""
    if whole := sorted(folder.glob("pytorch_model*.bin")):
        return [(file, "") for file in whole]
    parts = [(folder / part / "pytorch_model.bin", prefix) for part, prefix in PARTS_OF_FACTORY.items()]
    if missing := [file for file, _ in parts if not file.is_file()]:
        some = len(missing) < len(parts)
        beside = f"; of TinyLLaVA Factory's parts it lacks {missing[0].relative_to(folder)}" if some else ""
        raise CheckpointError(f"{folder} holds no .safetensors weights and no pytorch_model*.bin{beside}")
    return parts


def _require_same(
    source: Path, layout: str, config: LlavaConfig, tensors: dict[str, Tensor], wanted: dict[str, torch.Size]
) -> None:
    """Check that the tensors match the config; errors use the source's names."""
    theirs = {name: from_hf(name, layout, config) for name in tensors.keys() | wanted.keys()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise CheckpointError(f"{source} lacks {_named([theirs[name] for name in missing])}")
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise CheckpointError(
            f"{source} holds {_named([theirs[name] for name in unknown])} that its config has no place for"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{source}: {theirs[name]} is {tuple(tensors[name].shape)}, its config says {tuple(shape)}"
            )


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({shown})"


def _own_tensors(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Return a model's tensors by name, a tied LM head left out."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _write_other(options: ConvertOptions, parts: _Parts) -> None:
    """Write a Llava in another layout, with its tower and its LLM's config and tokenizer in folders beside the weights."""
    model, target, config = parts.model, options.target, parts.model.config
    # TinyLLaVA selects its classes by a word in these paths.
    tower = (target / TOWER) if options.to == "llava" else target / f"{TOWER}-{_word(config.vision_config.model_type)}"
    language = target / f"{LANGUAGE}-{config.text_config.model_type}"
    padded = bool(getattr(parts.processor, "do_pad", False))
    written = config_from_hf(config, options.to, str(language.resolve()), str(tower.resolve()), padded)
    processor = parts.processor
    if type(processor).__name__.startswith(
        "LlavaImageProcessor"
    ):  # newer than these projects, which pad images in their own code
        processor = CLIPImageProcessorPil(
            size=dict(processor.size),
            do_center_crop=False,
            resample=processor.resample,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
        )
    model.model.vision_tower.save_pretrained(tower)
    if options.to == "tinyllava":
        config.text_config.save_pretrained(language)
        parts.tokenizer.save_pretrained(language)
    for folder in (target, tower):
        processor.save_pretrained(folder)
    parts.tokenizer.save_pretrained(target)
    renamed = {from_hf(name, options.to, config): tensor for name, tensor in _own_tensors(model).items()}
    save_torch_state_dict(renamed, target, metadata={"format": "pt"}, safe_serialization=True)
    write_atomically(target / "config.json", json.dumps(written, indent=2, default=str))


def _word(model_type: str) -> str:
    return model_type.removesuffix("_vision_model")
