"""Assembling a student: the parts keep their weights, the result opens and trains."""

import components
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
)

from switchkd.cli.main import main
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.checkpoints.init_student import init_student
from switchkd.pipelines.checkpoints.options import InitOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

NO_IMAGE, tower, language = components.NO_IMAGE, components.tower, components.language


def run(*words):
    return CliRunner().invoke(main, ["init-student", *map(str, words)])


@pytest.mark.parametrize(
    ("kind", "both", "lm", "tied", "tokens"),
    [
        ("siglip", False, "qwen2", True, 4),
        ("siglip", True, "llama", False, 4),
        ("clip", True, "qwen3", True, 4),
    ],
)
def test_the_parts_keep_their_weights(tmp_path, kind, both, lm, tied, tokens):
    eyes, mind = tower(tmp_path / "eyes", kind, both), language(tmp_path / "mind", lm, tied=tied)
    done = run("--vision", eyes, "--language", mind, "--out", tmp_path / "s")
    assert done.exit_code == 0, done.output
    opened = open_checkpoint(tmp_path / "s")
    assert opened.image_tokens == tokens
    assert opened.image_token_id == len(NO_IMAGE) == opened.vocab_rows - 1
    model = load_model(opened)
    shown = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    assert shown in done.output and f"becomes {tokens} tokens" in done.output
    for part, folder in (("vision_tower", eyes), ("language_model", mind)):
        source = load_file(folder / "model.safetensors")
        for name, tensor in getattr(model.model, part).state_dict().items():
            twin = [key for key in source if f".{key}".endswith(f".{name}") and "text_model" not in key]
            assert len(twin) == 1 and torch.equal(source[twin[0]], tensor), name
    head = load_file(mind / "model.safetensors")["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head)
    weight = model.model.multi_modal_projector.linear_1.weight
    assert 0.01 < weight.std() < 0.03


def test_the_projector_depends_on_the_seed_alone(tmp_path):
    eyes, mind = tower(tmp_path / "eyes"), language(tmp_path / "mind")
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        init_student(InitOptions(eyes, mind, tmp_path / name, seed=seed))
        found.append(load_file(tmp_path / name / "model.safetensors")["multi_modal_projector.linear_1.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_ldpv2_and_a_llavas_tower(teacher, tmp_path):
    """The teacher's own tower of 2×2 patches, pooled to one token."""
    mind = language(tmp_path / "mind")
    done = run(
        "--vision", teacher, "--language", mind, "--out", tmp_path / "s", "--projector", "ldpv2", "--grid", 1,
        "--feature-layer", -1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    opened = open_checkpoint(tmp_path / "s")
    assert (opened.image_tokens, opened.feature_tokens, opened.config.model_type) == (1, 4, "switch_llava")
    theirs, ours = (load_model(o).model.vision_tower.state_dict() for o in (open_checkpoint(teacher), opened))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_the_embedding_grows_where_no_row_is_free(tmp_path):
    eyes, mind = tower(tmp_path / "eyes"), language(tmp_path / "mind", rows=len(NO_IMAGE))
    init_student(InitOptions(eyes, mind, tmp_path / "s"))
    opened = open_checkpoint(tmp_path / "s")
    assert opened.config.text_config.vocab_size == 64
    before = load_file(mind / "model.safetensors")["model.embed_tokens.weight"]
    after = load_model(opened).get_input_embeddings().weight
    assert torch.equal(after[: len(before)], before)
    assert after[len(before)].isfinite().all()


def test_a_teachers_tokenizer_is_taken_if_the_ids_are_the_same(teacher, tmp_path):
    eyes = tower(tmp_path / "eyes")
    short = language(tmp_path / "short", words=tiny.WORDS[:8])
    init_student(InitOptions(eyes, short, tmp_path / "s", tokenizer=teacher))
    assert open_checkpoint(tmp_path / "s").image_token_id == tiny.WORDS.index("<image>")
    other = language(tmp_path / "other")
    done = run("--vision", eyes, "--language", other, "--out", tmp_path / "t", "--tokenizer", teacher)
    assert done.exit_code == 2
    assert "of the 14 tokens of" in done.output and "another id or none, such as '<unk>'" in done.output


@pytest.mark.parametrize("mode", ("own", "square", "pad"))
def test_image_modes(tmp_path, mode):
    """A wide picture, red left and blue right: cropped, stretched, or with bars above and below."""
    init_student(InitOptions(tower(tmp_path / "eyes"), language(tmp_path / "mind"), tmp_path / "s", image_mode=mode))
    processor = open_checkpoint(tmp_path / "s").image_processor
    picture = Image.new("RGB", (64, 16), "red")
    picture.paste("blue", (32, 0, 64, 16))
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"][0]  # [3, 16, 16]
    mean, std = (torch.tensor(getattr(processor, f"image_{name}"))[:, None] for name in ("mean", "std"))
    column = pixels[:, :, 2] * std + mean
    bars = (column[:, 0] - mean[:, 0]).abs().max() < 0.01
    assert bool(bars) == (mode == "pad")
    assert pixels.shape == (3, 16, 16)
    left, right = pixels[:, 8, 0], pixels[:, 8, 15]
    assert left[0] > left[2] and right[2] > right[0]
    assert AutoImageProcessor.from_pretrained(tmp_path / "s", backend="pil").to_dict() == processor.to_dict()


MISTAKES = {
    "no tower": (("--vision", "nowhere"), "no checkpoint at nowhere"),
    "not a tower": (("--vision", "@mind"), "is a 'qwen2' model; expected a vision tower"),
    "not a language model": (("--language", "@eyes"), "cannot open checkpoint"),
    "out is there": (("--out", "@mind"), "is not empty: pass another --out"),
    "no square grid": (("--projector", "ldpv2", "--strategy", "default"), "LDPv2 pools a square grid of features"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    words, message = MISTAKES[mistake]
    tower(tmp_path / "eyes")
    language(tmp_path / "mind")
    usual = ("--vision", "@eyes", "--language", "@mind", "--out", "@s")
    done = run(*(str(word).replace("@", f"{tmp_path}/") for word in (*usual, *words)))
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "s").exists()


def test_what_was_assembled_trains(tmp_path):
    """With the projector alone, as stage PT does."""
    init_student(InitOptions(tower(tmp_path / "eyes"), language(tmp_path / "mind"), tmp_path / "s"))
    data = tiny.data(tmp_path / "data", tiny.rows(4))
    options = {
        "objective": "sft",
        "switch": False,
        "train_parts": "projector",
        "template": "qa",
        "steps": 2,
        "batch_size": 4,
    }
    given = {"student": tmp_path / "s", "data": data, "output": tmp_path / "run", "images": tmp_path / "data/images"}
    train(TrainOptions(**given, warmup=0.0, **options))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("s", "run"))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
