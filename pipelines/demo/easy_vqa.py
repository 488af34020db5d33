"""easy-VQA (PyPI package `easy-vqa`, V. Zhou 2019) as LLaVA-style data, and the tiny models of the demo.

4,000 + 1,000 images of 64×64 pixels, each one shape in one colour; 38,575 + 9,673 questions with 13 answers.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from switchkd.errors import ConfigError
from switchkd.pipelines.run_folder import write_atomically

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
BLIND_ACCURACY = 0.670  # answering from the question alone
SPECIAL = ("<pad>", "<eos>", "<image>", "<unk>")
TEMPLATE = "qa"


def package_folder() -> Path:
    """Return the data folder of the installed package. Raises ConfigError if it is not installed."""
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise ConfigError("the demo's data come with the package easy-vqa: pip install 'switchkd[demo]'")
    return Path(found.origin).parent / "data"


def write_data(folder: Path) -> None:
    """Write images and data files below `folder`; existing files are kept.

    train.json holds every training question, test.json every test question, captions.json a caption ("blue rectangle") for
    every training image whose colour and shape follow from its own questions. Training images exist plain and mirrored,
    and train.json and captions.json contain both.
    """
    source = package_folder()
    train, test = (json.loads((source / split / "questions.json").read_text()) for split in ("train", "test"))
    for split, questions in (("train", train), ("test", test)):
        _write_images(
            source / split / "images",
            folder / "images" / split,
            {number for _, _, number in questions},
            split == "train",
        )
    sides = ("", "m")
    rows = [_row(f"train/{number}{side}.png", text, answer) for side in sides for text, answer, number in train]
    captions = [
        _row(f"train/{number}{side}.png", "", f"{color} {shape}", "caption")
        for side in sides
        for number, color, shape in _captions(train)
    ]
    tests = [_row(f"test/{number}.png", text, answer) for text, answer, number in test]
    for name, content in (("train", rows), ("captions", captions), ("test", tests)):
        write_atomically(folder / f"{name}.json", json.dumps(content))


def _write_images(source: Path, target: Path, numbers: set[int], mirrored: bool) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for number in sorted(numbers):
        plain = target / f"{number}.png"
        if not plain.exists():
            plain.write_bytes((source / f"{number}.png").read_bytes())
        if mirrored and not (target / f"{number}m.png").exists():
            with Image.open(plain) as image:
                ImageOps.mirror(image.convert("RGB")).save(target / f"{number}m.png")


def _row(image: str, question: str, answer: str, kind: str | None = None) -> dict[str, Any]:
    kind = kind or ("color" if answer in COLORS else "shape" if answer in SHAPES else "yes/no")
    turns = [{"from": "human", "value": f"<image>\n{question}".strip()}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": image, "question_type": kind, "conversations": turns}


def spread(rows: list[Any], count: int) -> list[Any]:
    """Return `count` evenly spaced rows, from plain and mirrored images alike; all rows if there are fewer."""
    return rows if count >= len(rows) else [rows[i * len(rows) // count] for i in range(count)]


def words_of(text: str) -> list[str]:
    """Split a question or answer as the demo's tokenizer does."""
    return re.findall(r"\w+|\?", text.lower())


def _captions(questions: list[tuple[str, str, int]]) -> Iterator[tuple[int, str, str]]:
    """Yield (image number, colour, shape) for images whose questions and answers contain both."""
    known: dict[int, dict[str, str]] = {}
    for text, answer, number in questions:
        facts = known.setdefault(number, {})
        words = words_of(text)
        denied = "no" in words or "not" in words
        told = [answer]
        if answer in ("yes", "no") and (answer == "yes") != denied:
            told += words  # the statement in the question is true
        elif answer in COLORS or answer in SHAPES:
            told += words  # "what color is the circle?" contains the shape
        for word in told:
            if word in COLORS:
                facts["color"] = word
            elif word in SHAPES:
                facts["shape"] = word
    for number in sorted(known):
        if len(known[number]) == 2:
            yield number, known[number]["color"], known[number]["shape"]


def vocabulary() -> list[str]:
    """Return every word of questions and answers, sorted, after the question mark."""
    source = package_folder()
    questions = json.loads((source / "train" / "questions.json").read_text())
    words = {word for text, answer, _ in questions for word in (*words_of(text), answer)} - {"?"}
    return ["?", *sorted(words)]


def write_checkpoint(
    folder: Path,
    *,
    vision: dict[str, int],
    language: dict[str, int],
    seed: int,
    weights: Path | None = None,
    tower: Path | None = None,
    words: Sequence[str] | None = None,
) -> None:
    """Save a tiny Llava checkpoint: SigLIP tower, two-layer projector, Qwen2 LLM, word tokenizer, image processor.

    Args:
        vision, language: arguments of SiglipVisionConfig and Qwen2Config. seed: of the random weights.
        weights: a safetensors file that replaces them. tower: the same of the vision tower alone, see `emoji_vqa/tower.py`.
        words: that the tokenizer has after `SPECIAL`; None are those of easy-VQA.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = [*SPECIAL, *(vocabulary() if words is None else words)]
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **vision),
        text_config=Qwen2Config(
            vocab_size=len(words),
            tie_word_embeddings=True,
            max_position_embeddings=256,
            pad_token_id=words.index("<pad>"),
            eos_token_id=words.index("<eos>"),
            **language,
        ),
        image_token_index=words.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    if tower is not None:
        model.model.vision_tower.load_state_dict({name: t.float() for name, t in load_file(tower).items()})
    if weights is not None:
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        model.tie_weights()
    model.save_pretrained(folder)
    _word_tokenizer(words).save_pretrained(folder)
    size = vision["image_size"]
    SiglipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)


def _word_tokenizer(words: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )


ASSETS = Path(__file__).parent

TEACHER_WEIGHTS = ASSETS / "easy_vqa_teacher.safetensors"

VISION = {"hidden_size": 128, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}

TEACHER_VISION = VISION | {"num_hidden_layers": 4, "intermediate_size": 384}

TEACHER_LANGUAGE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
}

STUDENT_VISION = VISION | {"num_hidden_layers": 2, "intermediate_size": 256}

STUDENT_LANGUAGE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
