"""Assembly of a student from a vision tower, a language model and a newly initialised projector."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from switchkd.errors import CheckpointError, ConfigError
from switchkd.fingerprints import component_of
from switchkd.library_errors import as_checkpoint_error
from switchkd.models.checkpoint import (
    PIL_BACKEND,
    Checkpoint,
    open_checkpoint,
    probe_vision,
    processor_in_mode,
    token_rows,
)
from switchkd.models.pair import check_pair
from switchkd.models.projectors import SwitchLlavaConfig, image_token_count, model_class
from switchkd.pipelines.checkpoints.options import InitOptions
from switchkd.pipelines.checkpoints.parts import (
    IMAGE_TOKEN,
    load_tower,
    read_vision_config,
    require_all_weights,
    tokenizer_with_image,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitSummary:
    """The assembled student."""

    out: Path
    image_tokens: int
    image_token_id: int
    parameters: dict[str, int]  # of each component; tied weights count once


def init_student(options: InitOptions) -> InitSummary:
    """Write a student checkpoint: the unchanged weights of a tower and an LLM, and a projector with random weights.

    Raises:
        InputError: a folder cannot be used, the components do not fit, or `out` exists; raised before any weight is read.
    """
    _check(options)
    remote = options.trust_remote_code
    vision = read_vision_config(options.vision)
    if hasattr(vision, "vision_use_head"):
        vision.vision_use_head = False  # SigLIP's pooling head, which a Llava does not use
    with as_checkpoint_error(options.vision):
        processor = AutoImageProcessor.from_pretrained(options.vision, trust_remote_code=remote, **PIL_BACKEND)
    with as_checkpoint_error(options.language):
        text = AutoConfig.from_pretrained(options.language, trust_remote_code=remote)
    tokenizer = tokenizer_with_image(options.language, options.tokenizer, remote)
    config = _config(options, vision, text, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    processor = processor_in_mode(processor, options.image_mode, vision.image_size, options.vision)
    if options.teacher is not None:
        _check_teacher(options, options.teacher, config, tokenizer, processor)

    torch.manual_seed(options.seed)  # for rows that a new <image> token adds to the embedding
    language = _load_language(options, token_rows(tokenizer))
    tower = load_tower(options.vision, vision)
    torch.manual_seed(options.seed)  # for the projector, independent of earlier random draws
    model = assemble(config, tower, language)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    opened = open_checkpoint(options.out)
    parameters = dict.fromkeys(("vision", "projector", "language"), 0)
    for name, parameter in model.named_parameters():
        parameters[component_of(name)] += parameter.numel()
    return InitSummary(options.out, opened.image_tokens, opened.image_token_id, parameters)


def _check(options: InitOptions) -> None:
    for folder in (options.vision, options.language, options.tokenizer):
        if folder is not None and not folder.is_dir():
            raise CheckpointError(f"no checkpoint at {folder}: expected a folder")
    if options.out.exists() and any(options.out.iterdir()):
        raise ConfigError(f"{options.out} is not empty: pass another --out, nothing is overwritten")


def _config(options: InitOptions, vision: Any, text: Any, image_token: int) -> LlavaConfig:
    settings = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token,
        "vision_feature_layer": options.feature_layer,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    config = (
        LlavaConfig(**settings)
        if options.projector == "mlp"
        else SwitchLlavaConfig(**settings, projector_grid=options.grid)
    )
    with as_checkpoint_error(options.vision):
        features, _ = probe_vision(config, options.vision)
        has_class_token = features == (vision.image_size // vision.patch_size) ** 2 + 1
        config.vision_feature_select_strategy = options.strategy or ("default" if has_class_token else "full")
        config.image_seq_length = image_token_count(config, probe_vision(config, options.vision)[0])
    return config


def _check_teacher(options: InitOptions, teacher: Path, config: LlavaConfig, tokenizer: Any, processor: Any) -> None:
    """Compare the student that would be written with a teacher. Raises CheckpointError, which names the option to change."""
    config = copy.deepcopy(config)
    config.text_config.vocab_size = max(config.text_config.vocab_size, token_rows(tokenizer))
    features, width = probe_vision(config, options.vision)
    student = Checkpoint(
        options.out, config, tokenizer, processor, image_token_count(config, features), features, width
    )
    check_pair(open_checkpoint(teacher, options.trust_remote_code), student)


def _load_language(options: InitOptions, entries: int) -> Any:
    """Load the LLM, with a row in its embedding for every entry of the tokenizer."""
    with as_checkpoint_error(options.language):
        language, report = AutoModelForCausalLM.from_pretrained(
            options.language,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
        )
    require_all_weights(options.language, report, tied=language.config.tie_word_embeddings)
    rows = language.get_input_embeddings().weight.shape[0]
    if entries > rows:
        language.resize_token_embeddings(entries, pad_to_multiple_of=64)
        log.info("the embedding grew from %d to %d rows, near the mean of the others", rows, language.config.vocab_size)
    return language


def assemble(config: LlavaConfig, tower: nn.Module, language: Any) -> LlavaForConditionalGeneration:
    """Combine a tower and a causal LM with a projector of random weights, in the wider of their dtypes."""
    config.text_config.vocab_size = language.config.vocab_size
    with torch.device("meta"):
        model = model_class(config)(config)
    dtype = torch.promote_types(next(tower.parameters()).dtype, language.dtype)
    projector = type(model.model.multi_modal_projector)(config)
    projector.apply(model._init_weights)
    model.model.multi_modal_projector = projector
    head = language.get_output_embeddings().state_dict()
    for part, weights in (
        (model.model.vision_tower, tower.state_dict()),
        (model.model.language_model, language.get_decoder().state_dict()),
        (model.lm_head, head),
    ):
        part.load_state_dict(weights, assign=True)
    model.tie_weights()
    config.dtype = dtype
    return model.to(dtype)
