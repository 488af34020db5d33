"""Models without weights have the shapes, dtypes, ties and graphs of the loaded ones, in every family."""

import families
import pytest
import tiny
import torch

from switchkd.errors import ConfigError
from switchkd.models.block_attention import uses_block_attention
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.components import language_model_of
from switchkd.models.families import family_of
from switchkd.models.packing_probe import enable_packing_in
from switchkd.models.vlm import blank_media, freeze_unused_vision, load_model
from switchkd.models.weightless import build_weightless, expect_packing
from switchkd.pipelines.training.int8_teacher import GROUP, count_as_int8, stored_bytes

# In `make test`; `make test-families` runs all.
CORE = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "paligemma2")
each_family = pytest.mark.parametrize(
    "family", [name if name in CORE else pytest.param(name, marks=pytest.mark.families) for name in families.FAMILIES]
)


def parameters_of(model):
    return [(name, p.shape, p.dtype, p.nbytes, p.requires_grad) for name, p in model.named_parameters()]


@each_family
def test_it_is_the_loaded_model_without_its_memory(family, tmp_path):
    opened = open_checkpoint(families.write_checkpoint(family, tmp_path / "ckpt", 0, tied=family == "qwen2_5_vl"))
    (opened.path / "model.safetensors").unlink()
    built = {vision: build_weightless(opened, vision=vision, dtype="float32") for vision in (True, False)}
    families.write_checkpoint(family, opened.path, 0, tied=family == "qwen2_5_vl")
    for vision, model in built.items():
        loaded = load_model(opened, vision=vision, dtype="float32")
        assert type(model) is type(loaded) and not model.training
        assert parameters_of(model) == parameters_of(loaded)
        assert all(p.untyped_storage().nbytes() <= 4 for p in model.parameters())
        assert build_weightless(opened, vision=vision, dtype="bfloat16").dtype == torch.bfloat16
    media = blank_media(opened.config) if family_of(opened.config).is_llava else families.media(family)
    whole = load_model(opened, dtype="float32")
    assert freeze_unused_vision(built[True], media) == freeze_unused_vision(whole, media)
    assert parameters_of(built[True]) == parameters_of(whole)


@each_family
def test_it_expects_the_attention_that_the_probe_chooses(family, tmp_path):
    opened = open_checkpoint(families.write_checkpoint(family, tmp_path / "ckpt", 0))
    model, loaded = build_weightless(opened), load_model(opened)
    media = families.one_image(family, families.media(family))
    try:
        enable_packing_in(loaded, "m", media)
    except ConfigError:
        with pytest.raises(ConfigError, match="--packing"):
            expect_packing(model, "m")
        return
    expect_packing(model, "m")
    assert uses_block_attention(language_model_of(model)) == uses_block_attention(language_model_of(loaded))


def test_unused_weights_of_a_tower_are_those_without_a_gradient(tmp_path):
    vision = tiny.vision_config("clip", width=16, layers=3)
    model = load_model(open_checkpoint(tiny.checkpoint(tmp_path / "m", 0, width=16, vision=vision, layer=-2)))
    tower = model.model.vision_tower
    tiny.vision_features(model, torch.zeros(1, 3, 16, 16)).sum().backward()
    expected = [name for name, p in tower.named_parameters() if p.grad is None]
    assert expected and freeze_unused_vision(model) == expected
    assert [name for name, p in tower.named_parameters() if not p.requires_grad] == expected


def test_int8_layers_are_counted_without_torchao(tmp_path):
    opened = open_checkpoint(tiny.checkpoint(tmp_path / "m", 0, width=64))
    model = build_weightless(opened, vision=False, dtype="float32")
    before = {name: p.nbytes for name, p in model.named_parameters()}
    count_as_int8(language_model_of(model))
    layers = [name for name in before if ".layers." in name and name.endswith("proj.weight")]
    for name, p in model.named_parameters():
        numbers = p.numel()
        expected = numbers + numbers // GROUP * (4 + 1) if name in layers else before[name]
        assert stored_bytes(p) == expected, name
