"""Opening checkpoints, the teacher without its vision tower, and what must fit between two models."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import check_compatible, open_checkpoint, teacher_identity
from switchkd.models.vlm import freeze_unused_vision, load_model


@pytest.mark.parametrize(
    ("kind", "layer", "strategy", "tokens"),
    [("siglip", -1, "full", 4), ("siglip", -2, "default", 3), ("clip", -2, "default", 4), ("clip", -1, "full", 5)],
)
def test_image_tokens_are_measured_as_the_model_makes_them(tmp_path, kind, layer, strategy, tokens):
    vision = tiny.vision_config(kind, width=16)
    path = tiny.checkpoint(tmp_path / "m", 0, width=16, vision=vision, layer=layer, strategy=strategy)
    opened = open_checkpoint(path)
    assert (opened.image_tokens, opened.feature_width) == (tokens, 16)
    features = tiny.vision_features(load_model(opened), torch.zeros(2, 3, 16, 16))
    assert features.shape == (2, tokens, 16)


def test_several_feature_layers_add_up(tmp_path):
    path = tiny.checkpoint(tmp_path / "m", 0, width=16, vision=tiny.vision_config(width=16), layer=[-1, -2])
    assert open_checkpoint(path).feature_width == 32


def test_the_teacher_without_vision_equals_the_whole_one(teacher):
    opened = open_checkpoint(teacher)
    whole, blind = load_model(opened), load_model(opened, vision=False)
    assert blind.model.vision_tower is None
    assert not [name for name, _ in blind.named_parameters() if "vision" in name]
    ids = torch.tensor([[5, 6, 7, 4, 10, 1]])
    torch.testing.assert_close(blind(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=0)


def test_the_vision_weights_are_not_read(teacher, tmp_path):
    """The file that holds them may be gone."""
    folder = shutil.copytree(teacher, tmp_path / "blind")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    assert load_model(opened, vision=False).model.vision_tower is None
    assert teacher_identity(opened, vision=False) == teacher_identity(open_checkpoint(teacher), vision=False)
    with pytest.raises(CheckpointError, match="lacks .* weights, the first is"):
        load_model(opened)


def test_missing_weights_are_an_error(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "mlp.down_proj" in name and "layers.0" in name)
    save_file({n: t for n, t in weights.items() if n != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, the first is .*layers\.0\.mlp\.down_proj"):
        load_model(open_checkpoint(folder))


def test_parameters_that_no_gradient_reaches_are_frozen(tmp_path):
    vision = tiny.vision_config(width=16, layers=3)
    model = load_model(open_checkpoint(tiny.checkpoint(tmp_path / "m", 0, width=16, vision=vision, layer=-2)))
    names = freeze_unused_vision(model)
    assert {name.split(".layers.")[-1].split(".")[0] for name in names if ".layers." in name} == {"2"}
    assert any("post_layernorm" in name for name in names)
    tiny.vision_features(model, torch.zeros(1, 3, 16, 16)).sum().backward()
    tower = model.model.vision_tower
    assert all(p.grad is not None for p in tower.parameters() if p.requires_grad)


def test_a_teacher_and_its_student_fit(teacher, student):
    check_compatible(open_checkpoint(teacher), open_checkpoint(student), switch=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"words": [*tiny.WORDS, "green"]}, "tokenizers differ .15 and 16 entries"),
        ({"vision": tiny.vision_config(size=24)}, "4 tokens for the teacher and 9 for the student"),
        ({"vision": tiny.vision_config(width=16)}, r"\(width 16\).*\(width 32\).*--no-switch"),
    ],
)
def test_what_does_not_fit_is_named_with_both_sides(teacher, tmp_path, build, message):
    other = open_checkpoint(tiny.checkpoint(tmp_path / "m", 3, width=16, layers=1, **build))
    with pytest.raises(CheckpointError, match=message) as caught:
        check_compatible(open_checkpoint(teacher), other, switch=True)
    assert str(teacher) in str(caught.value)
    assert str(other.path) in str(caught.value)


def test_another_width_is_fine_without_the_switch(teacher, tmp_path):
    narrow = tiny.checkpoint(tmp_path / "m", 3, width=16, vision=tiny.vision_config(width=16))
    check_compatible(open_checkpoint(teacher), open_checkpoint(narrow), switch=False)


def test_a_model_with_more_rows_than_the_tokenizer_fits(teacher, tmp_path):
    padded = open_checkpoint(tiny.checkpoint(tmp_path / "m", 3, width=16, rows=24))
    assert padded.vocab_rows == len(tiny.WORDS)
    check_compatible(open_checkpoint(teacher), padded, switch=True)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere: expected a folder with a config\.json"):
        open_checkpoint(tmp_path / "nowhere")


def test_another_kind_of_model(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(
        CheckpointError, match=r"is a 'qwen2' model, which transformers does not know as a model that reads images"
    ):
        open_checkpoint(folder)


def test_weights_in_a_pickle_are_not_read(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_model(open_checkpoint(folder))


def test_saved_dtype_is_kept_and_named(teacher, tmp_path):
    folder = tmp_path / "half"
    LlavaForConditionalGeneration.from_pretrained(teacher).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    shutil.copy(teacher / "preprocessor_config.json", folder)
    opened = open_checkpoint(folder)
    assert opened.resolve_dtype("auto") == "bfloat16"
    assert load_model(opened).dtype == torch.bfloat16
    assert load_model(opened, dtype="float32").dtype == torch.float32
