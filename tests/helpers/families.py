"""Tiny random models of transformers' families of vision-language models, and checkpoints of them as users have them.

Towers are three or four layers on images of a few patches, language models two to four layers of width 32, float32. Token ids are
those of a hand-made byte-level tokenizer; media are random, of two images with other numbers of tokens where the family allows it.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from switchkd.models.components import tower_layers_of

WIDTH = 32  # of the language models
PATCH, SIDE = 4, 16  # pixels
WORDS = ["what is the color of this thing? a red cat. a blue dog sits on the mat."] * 3


@dataclass(frozen=True)
class Words:
    """Special tokens of a family; `prompt` is what its chat template writes for an image."""

    image: str = "<image>"
    video: str = "<video>"
    before: str = "<before>"
    after: str = "<after>"
    turn: str = "<|im_start|>"
    end: str = "<|im_end|>"
    prompt: str = "<image>\n"
    named: tuple[tuple[str, str], ...] = ()  # attributes of the tokenizer that the processor reads
    more: tuple[str, ...] = ()


QWEN = Words(
    image="<|image_pad|>",
    video="<|video_pad|>",
    before="<|vision_start|>",
    after="<|vision_end|>",
    prompt="<|vision_start|><|image_pad|><|vision_end|>",
    named=(
        ("video_token", "<|video_pad|>"),
        ("vision_start_token", "<|vision_start|>"),
        ("vision_end_token", "<|vision_end|>"),
    ),
)
GLM = Words(
    image="<|image|>",
    video="<|video|>",
    before="<|begin_of_image|>",
    after="<|end_of_image|>",
    prompt="<|begin_of_image|><|image|><|end_of_image|>",
    named=(("video_token", "<|video|>"),),
    more=("<|begin_of_video|>", "<|end_of_video|>"),
)
GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
TILED = Words(
    before="<fake_token_around_image>",
    after="<global-img>",
    end="<end_of_utterance>",
    prompt="<image>",
    named=(
        ("fake_image_token", "<fake_token_around_image>"),
        ("global_image_token", "<global-img>"),
        ("end_of_utterance_token", "<end_of_utterance>"),
    ),
    more=GRID,
)
LOCATIONS = tuple(f"<loc{i:0>4}>" for i in range(1024)) + tuple(f"<seg{i:0>3}>" for i in range(128))
SPECIAL = {
    "llava": Words(),
    "vipllava": Words(),
    "llava_next": Words(),
    "llava_onevision": Words(),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "glm4v": GLM,
    "glm46v": GLM,
    "smolvlm": TILED,
    "idefics3": TILED,
    "internvl": Words(
        image="<IMG_CONTEXT>",
        before="<img>",
        after="</img>",
        prompt="<IMG_CONTEXT>\n",
        named=(
            ("start_image_token", "<img>"),
            ("end_image_token", "</img>"),
            ("context_image_token", "<IMG_CONTEXT>"),
            ("video_token", "<video>"),
        ),
    ),
    "gemma3": Words(
        image="<image_soft_token>",
        before="<start_of_image>",
        after="<end_of_image>",
        turn="<start_of_turn>",
        end="<end_of_turn>",
        prompt="<start_of_image>",
        named=(("boi_token", "<start_of_image>"), ("eoi_token", "<end_of_image>")),
    ),
    "paligemma": Words(more=LOCATIONS),
    "paligemma2": Words(more=LOCATIONS),
    "mistral3": Words(image="[IMG]", before="[IMG_BREAK]", after="[IMG_END]", prompt="[IMG]"),
}
FAMILIES = tuple(SPECIAL)  # "paligemma2" is paligemma with Gemma 2, whose logits are soft-capped


@functools.cache
def _backend(family: str) -> str:
    words = SPECIAL[family]
    special = ["<pad>", "<s>", "</s>", words.image, words.video, words.before, words.after, words.turn, words.end]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=[*special, *words.more], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made.to_str()


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    words = SPECIAL[family]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(family)),
        bos_token="<s>",
        eos_token=words.end,
        pad_token="<pad>",
        extra_special_tokens={"image_token": words.image, **dict(words.named)},
    )
    made.chat_template = chat_template(family)
    return made


def chat_template(family: str) -> str | None:
    """ChatML with the family's words for an image; PaliGemma has none."""
    if family.startswith("paligemma"):
        return None
    words = SPECIAL[family]
    image = words.prompt.replace("\n", "\\n")
    return (
        "{% for m in messages %}{{ '" + words.turn + "' + m['role'] + '\\n' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '" + image + "' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '" + words.end + "\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + words.turn + "assistant\\n' }}{% endif %}"
    )


# -- configs -----------------------------------------------------------------------------------------------------------------


def _text(kind: str, **options) -> dict:
    return {
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
    } | options


def _tower(kind: str, **options) -> dict:
    return {
        "model_type": kind,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
    } | options


def _patches(**options) -> dict:
    """A tower of the Qwen line."""
    return {
        "depth": 3,
        "in_channels": 3,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_heads": 4,
    } | options


def _rotary(**options) -> dict:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0} | options}


CLIP = _tower("clip_vision_model", projection_dim=16)
SIGLIP = _tower("siglip_vision_model", vision_use_head=False)
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
WIDE = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": WIDTH}
LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
INTERLEAVED = _rotary(mrope_interleaved=True)
DEEPSTACK = _patches(**WIDE, depth=4, num_position_embeddings=16, deepstack_visual_indexes=[1, 2])
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CAPPED = {
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
}
FEW_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GLM_PARTS = (
    _text("glm4v_text", **_rotary(partial_rotary_factor=1.0)),
    _patches(**WIDE, image_size=SIDE),
    {},
)
# family → text config, vision config, further fields
CONFIGS: dict[str, tuple[dict, dict, dict]] = {
    "llava": (
        _text("llama"),
        CLIP,
        {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    ),
    "vipllava": (_text("llama"), CLIP, {"vision_feature_layers": [-2, -1]}),
    "llava_next": (
        _text("llama"),
        CLIP,
        {
            "image_grid_pinpoints": PINPOINTS[1:],
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    ),
    "llava_onevision": (
        _text("qwen2"),
        SIGLIP,
        {"image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": (
        _text("qwen2_vl_text", **_rotary()),
        _patches(embed_dim=32, hidden_size=WIDTH, mlp_ratio=2),
        {},
    ),
    "qwen2_5_vl": (
        _text("qwen2_5_vl_text", **_rotary()),
        _patches(**WIDE, window_size=16, fullatt_block_indexes=[1]),
        {},
    ),
    "qwen3_vl": (_text("qwen3_vl_text", num_hidden_layers=4, **INTERLEAVED), DEEPSTACK, {}),
    "qwen3_vl_moe": (_text("qwen3_vl_moe_text", **EXPERTS, **INTERLEAVED), DEEPSTACK, {}),
    "qwen3_5": (
        _text("qwen3_5_text", **LINEAR, **_rotary(mrope_interleaved=True, partial_rotary_factor=1.0)),
        _patches(**WIDE, num_position_embeddings=16),
        {},
    ),
    "qwen3_5_moe": (
        _text(
            "qwen3_5_moe_text", **LINEAR, **FEW_EXPERTS, **_rotary(mrope_interleaved=True, partial_rotary_factor=1.0)
        ),
        _patches(**WIDE, num_position_embeddings=16),
        {},
    ),
    "glm4v": GLM_PARTS,
    "glm46v": GLM_PARTS,
    "smolvlm": (_text("llama"), _tower("smolvlm_vision"), {"scale_factor": 2}),
    "idefics3": (_text("llama"), _tower("idefics3_vision"), {"scale_factor": 2}),
    "internvl": (
        _text("qwen3"),
        _tower("internvl_vision", image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        {"image_seq_length": 4},
    ),
    "gemma3": (_text("gemma3_text", **SLIDING), SIGLIP, {"mm_tokens_per_image": 4}),
    "paligemma": (_text("gemma"), SIGLIP | {"projection_dim": WIDTH}, {"projection_dim": WIDTH, "hidden_size": WIDTH}),
    "paligemma2": (
        _text("gemma2", **CAPPED),
        SIGLIP | {"projection_dim": WIDTH},
        {"projection_dim": WIDTH, "hidden_size": WIDTH},
    ),
    "mistral3": (
        _text("mistral", sliding_window=None),
        _tower("pixtral", hidden_size=32, intermediate_size=48, num_attention_heads=4, image_size=48, head_dim=8),
        {"spatial_merge_size": 2},
    ),
}
# Families whose config calls the id of the image token image_token_index
OLD_NAMES = ("llava", "vipllava", "llava_next", "llava_onevision", "gemma3", "paligemma", "paligemma2", "mistral3")


def config(family: str, *, vision: dict | None = None, text: dict | None = None, tied: bool = False, **more):
    """A tiny config; `vision`, `text` and `more` replace fields of it."""
    words, made = SPECIAL[family], tokenizer(family)
    text_fields, vision_fields, fields = CONFIGS[family]
    ids = {word: made.convert_tokens_to_ids(word) for word in (words.image, words.video, words.before, words.after)}
    rows = {"vocab_size": (len(made) + 31) // 16 * 16, "eos_token_id": made.eos_token_id}  # padded, as real ones are
    fields = {
        "text_config": text_fields | rows | {"tie_word_embeddings": tied} | (text or {}),
        "vision_config": vision_fields | (vision or {}),
        ("image_token_index" if family in OLD_NAMES else "image_token_id"): ids[words.image],
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": made.eos_token_id,
    } | fields
    if words is QWEN:
        fields |= {"vision_start_token_id": ids[words.before], "vision_end_token_id": ids[words.after]}
        fields |= {"video_token_id": ids[words.video]}
    if family.startswith("glm4"):
        fields |= {"image_start_token_id": ids[words.before], "image_end_token_id": ids[words.after]}
        fields |= {"video_token_id": ids[words.video]}
        fields |= {
            f"video_{side}_token_id": made.convert_tokens_to_ids(f"<|{word}_of_video|>")
            for side, word in (("start", "begin"), ("end", "end"))
        }
    if family == "llava_onevision":
        fields |= {"video_token_index": ids[words.video]}
    if family == "gemma3":
        fields |= {"boi_token_index": ids[words.before], "eoi_token_index": ids[words.after]}
    if family.startswith("paligemma"):
        fields["vocab_size"] = rows["vocab_size"]
    return AutoConfig.for_model("paligemma" if family == "paligemma2" else family, **fields | more)


def build(family: str, seed: int, **options):
    """A tiny random model in evaluation mode, float32; `options` as `config` takes them."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config(family, **options)).eval()
    with torch.no_grad():  # random everywhere, norms near 1, so that nothing is degenerate
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.25 if "embed" in name else 0.18)
            elif "norm" in name and "weight" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


# -- batches -----------------------------------------------------------------------------------------------------------------


def media(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random media of two images, one a sample, in the columns that the family's processor makes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if family in ("llava_next", "llava_onevision"):
        pixels = random(2, 5, 3, SIDE, SIDE)
        pixels[1, 3:] = 0  # the second image has three tiles
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[30, 20], [12, 31]])}
    if family.startswith(("qwen", "glm4")):
        grid = torch.tensor([[1, 6, 8], [1, 4, 10]])
        return {"pixel_values": random(int(grid.prod(1).sum()), 3 * 2 * PATCH**2), "image_grid_thw": grid}
    if family in ("smolvlm", "idefics3"):
        pixels, mask = random(2, 5, 3, SIDE, SIDE), torch.ones(2, 5, SIDE, SIDE, dtype=torch.bool)
        pixels[1, 3:], mask[1, 3:] = 0, False
        return {"pixel_values": pixels, "pixel_attention_mask": mask}
    if family == "internvl":
        return {"pixel_values": random(4, 3, SIDE, SIDE)}  # three tiles and one
    if family == "mistral3":
        return {"pixel_values": random(2, 3, 24, 32), "image_sizes": torch.tensor([[24, 32], [16, 24]])}
    return {"pixel_values": random(2, 3, SIDE, SIDE)}


def one_image(family: str, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The columns of the first of the two images of `media`."""
    first = (
        3 if family == "internvl" else int(columns["image_grid_thw"][0].prod()) if "image_grid_thw" in columns else 1
    )
    return {name: value[: first if name == "pixel_values" else 1] for name, value in columns.items()}


def image_tokens(model, columns: dict[str, torch.Tensor]) -> list[int]:
    """The number of tokens of each of the two images."""
    with torch.no_grad():
        counts = [len(states) for states in model.model.get_image_features(**columns, return_dict=True).pooler_output]
    return counts if len(counts) == 2 else [sum(counts[:-1]), counts[-1]]


def batch(family: str, model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two samples with an image each, padded on the right, with the media of `media`; labels on the last five tokens."""
    columns, words, made = media(family, seed), SPECIAL[family], tokenizer(family)
    before, image, after = made.convert_tokens_to_ids([words.before, words.image, words.after])
    first = len(made) - 90  # ordinary tokens
    generator = torch.Generator().manual_seed(seed + 7)
    samples = [
        [1, first, before, *[image] * count, after, *torch.randint(first, len(made), (more,), generator=generator)]
        for count, more in zip(image_tokens(model, columns), (9, 14), strict=True)
    ]
    width = max(map(len, samples))
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    labels = torch.full((2, width), -100)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
        labels[row, len(sample) - 5 : len(sample)] = ids[row, len(sample) - 5 : len(sample)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | columns


# -- checkpoints -------------------------------------------------------------------------------------------------------------

SQUARE = {"size": {"height": SIDE, "width": SIDE}}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FLAT = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2} | HALF
SPLIT = {
    "size": {"longest_edge": 3 * SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "do_image_splitting": True,
} | HALF
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
QWEN_IMAGES = ("Qwen2VLImageProcessorPil", FLAT | {"size": {"shortest_edge": 64, "longest_edge": 4096}})
CLASS_TOKEN = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
# family → image processor and its settings; processor and its settings; video processor
PROCESSORS: dict[str, tuple[tuple[str, dict], tuple[str, dict], str | None]] = {
    "llava": (("CLIPImageProcessorPil", CROPPED), ("LlavaProcessor", CLASS_TOKEN), None),
    "vipllava": (("CLIPImageProcessorPil", CROPPED), ("LlavaProcessor", CLASS_TOKEN), None),
    "llava_next": (
        ("LlavaNextImageProcessorPil", CROPPED | {"image_grid_pinpoints": PINPOINTS[1:]}),
        ("LlavaNextProcessor", CLASS_TOKEN),
        None,
    ),
    "llava_onevision": (
        ("LlavaOnevisionImageProcessorPil", SQUARE | {"image_grid_pinpoints": PINPOINTS}),
        ("LlavaOnevisionProcessor", {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
        "LlavaOnevisionVideoProcessor",
    ),
    "qwen2_vl": (QWEN_IMAGES, ("Qwen2VLProcessor", {}), "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": (QWEN_IMAGES, ("Qwen2_5_VLProcessor", {}), "Qwen2VLVideoProcessor"),
    "qwen3_vl": (QWEN_IMAGES, ("Qwen3VLProcessor", {}), "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": (QWEN_IMAGES, ("Qwen3VLProcessor", {}), "Qwen3VLVideoProcessor"),
    "qwen3_5": (QWEN_IMAGES, ("Qwen3VLProcessor", {}), "Qwen3VLVideoProcessor"),
    "qwen3_5_moe": (QWEN_IMAGES, ("Qwen3VLProcessor", {}), "Qwen3VLVideoProcessor"),
    "glm4v": (
        ("Glm4vImageProcessorPil", FLAT | {"size": {"shortest_edge": 128, "longest_edge": 8192}}),
        ("Glm4vProcessor", {}),
        "Glm4vVideoProcessor",
    ),
    "glm46v": (
        ("Glm46VImageProcessorPil", FLAT | {"size": {"shortest_edge": 128, "longest_edge": 8192}}),
        ("Glm46VProcessor", {}),
        "Glm46VVideoProcessor",
    ),
    "smolvlm": (
        ("SmolVLMImageProcessorPil", SPLIT),
        ("SmolVLMProcessor", {"image_seq_len": 4}),
        "SmolVLMVideoProcessor",
    ),
    "idefics3": (("Idefics3ImageProcessorPil", SPLIT), ("Idefics3Processor", {"image_seq_len": 4}), None),
    "internvl": (
        ("GotOcr2ImageProcessorPil", SQUARE | {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}),
        ("InternVLProcessor", {"image_seq_length": 4}),
        "InternVLVideoProcessor",
    ),
    "gemma3": (("Gemma3ImageProcessorPil", SQUARE), ("Gemma3Processor", {"image_seq_length": 4}), None),
    "paligemma": (("SiglipImageProcessorPil", SQUARE | {"image_seq_length": 16}), ("PaliGemmaProcessor", {}), None),
    "paligemma2": (("SiglipImageProcessorPil", SQUARE | {"image_seq_length": 16}), ("PaliGemmaProcessor", {}), None),
    "mistral3": (
        ("PixtralImageProcessorPil", {"size": {"longest_edge": 48}, "patch_size": PATCH} | HALF),
        ("PixtralProcessor", {"patch_size": PATCH, "spatial_merge_size": 2}),
        None,
    ),
}


def image_processor(family: str):
    kind, settings = PROCESSORS[family][0]
    return getattr(transformers, kind)(**settings)


def write_checkpoint(family: str, folder: Path, seed: int, *, shards: bool = False, **options) -> Path:
    """Save a model of `build` with tokenizer, image processor and processor, and return its folder.

    `processor_config.json` is written as a file, since transformers makes the processors of families with video only where
    torchvision is installed. With `shards`, the weights are in files of a few tensors each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = build(family, seed, **options)
    model.save_pretrained(folder, **({"max_shard_size": "8KB"} if shards else {}))
    made = tokenizer(family)
    made.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    _, (kind, settings), video = PROCESSORS[family]
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind} | settings, indent=2))
    if video is not None:
        (folder / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": video}, indent=2))
    return folder


def is_hollow(model) -> bool:
    """Whether the layers of the vision tower hold no weights."""
    return not any(True for layer in tower_layers_of(model) for _ in layer.parameters())
