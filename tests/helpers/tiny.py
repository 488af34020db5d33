"""Tiny checkpoints, images and data files for tests; everything is made on the spot from fixed seeds."""

import json
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from switchkd.models.features import capture_features, image_outputs
from switchkd.models.projectors import SwitchLlavaConfig, model_class

WORDS = [
    "<pad>",
    "<eos>",
    "<image>",
    "<unk>",
    "?",
    "what",
    "is",
    "it",
    "color",
    "shape",
    "red",
    "blue",
    "circle",
    "square",
    "a",
]


def tokenizer(words=WORDS):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"] if "<image>" in words else [],
    )


def vision_config(kind="siglip", width=32, layers=2, size=16, patch=8):
    options = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "image_size": size,
        "patch_size": patch,
    }
    return SiglipVisionConfig(vision_use_head=False, **options) if kind == "siglip" else CLIPVisionConfig(**options)


LANGUAGES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def text_config(kind="qwen2", width=32, layers=2, rows=15, tied=True):
    options = {"head_dim": width // 2} if kind == "qwen3" else {}
    return LANGUAGES[kind](
        vocab_size=rows,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **options,
    )


def checkpoint(
    folder: Path,
    seed: int,
    *,
    width=32,
    layers=2,
    vision=None,
    language="qwen2",
    rows=None,
    words=WORDS,
    layer=-1,
    strategy="full",
    tied=True,
    grid=None,
    words_of=None,
) -> Path:
    """Save a tiny Llava with tokenizer and image processor, and return its folder; with `grid` its projector is LDPv2.

    `words_of` is a tokenizer instead of one of `words`; `language` may be a config of the text model.
    """
    words_of = words_of or tokenizer(words)
    torch.manual_seed(seed)
    text = text_config(language, width, layers, rows or len(words_of), tied) if isinstance(language, str) else language
    vision = vision or vision_config()
    kind = LlavaConfig if grid is None else partial(SwitchLlavaConfig, projector_grid=grid)
    config = kind(
        vision_config=vision,
        text_config=text,
        image_token_index=words_of.convert_tokens_to_ids("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    model = model_class(config)(config)
    with torch.no_grad():  # wider than the usual initialisation, so that tiny models say different things
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    words_of.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(folder)
    return folder


def image(path: Path, seed: int, size=(20, 18)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]


def rows(count: int, text_only=(), two_turns=()) -> list[dict]:
    """LLaVA-style rows over images/000.png …"""
    out = []
    for i in range(count):
        turns = [("what color is it ?", ("red", "blue")[i % 2])]
        if i in two_turns:
            turns.append(("what shape ?", "a circle"))
        if i in text_only:
            out.append({"id": f"t{i}", "conversations": conversation(*turns)})
        else:
            turns[0] = ("<image>\n" + turns[0][0], turns[0][1])
            out.append(
                {
                    "id": f"s{i}",
                    "image": f"{i:03d}.png",
                    "conversations": conversation(*turns),
                    "question_type": "color",
                }
            )
    return out


def data(folder: Path, content: list[dict], images=True) -> Path:
    """Write a data file and its images; returns the file, images are in `folder/images`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    if images:
        for i, row in enumerate(content):
            if isinstance(row, dict) and isinstance(row.get("image"), str):
                image(folder / "images" / row["image"], i)
    path = folder / "data.json"
    path.write_text(json.dumps(content))
    return path


def spelled(encoder, encoded):
    """The tokens of an encoded sample, supervised ones in «»."""
    words = encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    return [f"«{word}»" if on else word for word, on in zip(words, encoded.supervised, strict=True)]


def pixels_of(encoded):
    """A Llava's pixels of an encoded sample, [3, H, W]; None for text only."""
    return None if encoded.media is None else encoded.media["pixel_values"][0]


def vision_features(model, pixels):
    """V(x) of a Llava, the features that enter the projector: [B, 3, H, W] → [B, n, d_v]."""
    with capture_features(model) as captured:
        image_outputs(model, {"pixel_values": pixels})
    (features,) = captured.values()
    return features
