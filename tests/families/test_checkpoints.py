"""Checkpoints of every family: opened, loaded whole and hollow, compared with each other before anything expensive."""

import json

import families as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

from switchkd.errors import CheckpointError, ConfigError
from switchkd.fingerprints import component_of
from switchkd.models.block_attention import uses_block_attention
from switchkd.models.checkpoint import check_compatible, open_checkpoint, teacher_identity, with_image_mode
from switchkd.models.components import language_model_of, lm_head_of
from switchkd.models.families import family_of
from switchkd.models.features import capture_features, cut_shapes, image_outputs
from switchkd.models.fit import probe_cuts
from switchkd.models.packing_probe import check_packing, enable_packing_in
from switchkd.models.vlm import load_lm_head, load_model

OTHERS = [family for family in tiny.FAMILIES if family != "llava"]
MROPE = [family for family in tiny.FAMILIES if family_of(tiny.config(family)).mrope]


@pytest.fixture(scope="module", params=OTHERS)
def saved(request, tmp_path_factory):
    return request.param, tiny.write_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "ckpt", 1)


def test_a_checkpoint_opens_and_loads_whole_and_hollow(saved):
    family, folder = saved
    opened = open_checkpoint(folder)
    assert opened.config.model_type == tiny.config(family).model_type
    assert (opened.image_tokens, opened.feature_tokens, opened.feature_width) == (0, 0, 0)  # they depend on the image
    assert opened.image_token_id == opened.tokenizer.convert_tokens_to_ids(tiny.SPECIAL[family].image)
    whole, hollow = load_model(opened), load_model(opened, vision=False)
    assert type(hollow).__mro__[1] is type(whole) is type(tiny.build(family, 1))
    assert tiny.is_hollow(hollow) and not tiny.is_hollow(whole)
    theirs = whole.state_dict()
    for name, tensor in hollow.state_dict().items():
        assert component_of(name) == "vision" or torch.equal(tensor, theirs[name])
    assert load_model(opened, vision=False, dtype="bfloat16").dtype == torch.bfloat16
    assert torch.equal(load_lm_head(opened, "float32"), whole.lm_head.weight)


@pytest.mark.parametrize("family", OTHERS)
def test_a_hollow_model_reads_no_byte_of_the_towers_files(family, tmp_path):
    """They may be absent; what is read is the other components' weights, byte for byte."""
    opened = open_checkpoint(tiny.write_checkpoint(family, tmp_path / "ckpt", 1, shards=True))
    whole = load_model(opened).state_dict()
    files = {file: load_file(file) for file in opened.path.glob("*.safetensors")}
    of_tower = [file for file, tensors in files.items() if {component_of(name) for name in tensors} == {"vision"}]
    sizes = [sum(file.stat().st_size for file in some) for some in (of_tower, files)]
    assert len(of_tower) >= 3 and sizes[0] > 0.1 * sizes[1], (
        "hardly a file is the tower's alone: the test tests nothing"
    )
    for file in of_tower:
        file.unlink()
    hollow = load_model(opened, vision=False).state_dict()
    read = [name for name in whole if component_of(name) != "vision"]
    assert read and all(torch.equal(hollow[name], whole[name]) for name in read)
    with pytest.raises(CheckpointError, match=str(opened.path)):
        load_model(opened)


@pytest.mark.parametrize("family", OTHERS)
def test_a_tied_head_is_the_embedding(family, tmp_path):
    opened = open_checkpoint(tiny.write_checkpoint(family, tmp_path / "ckpt", 1, tied=True))
    assert "lm_head.weight" not in load_file(opened.path / "model.safetensors")
    for vision in (True, False):
        model = load_model(opened, vision=vision)
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(load_lm_head(opened, "float32"), model.lm_head.weight)


@pytest.mark.parametrize("component", ["language", "projector", "vision"])
def test_a_missing_weight_is_an_error(saved, component, tmp_path):
    """Never a warning; what the hollow teacher does not read may be missing from it."""
    other = tiny.write_checkpoint(saved[0], tmp_path / "ckpt", 1)
    weights = load_file(other / "model.safetensors")
    gone = next(name for name in weights if component_of(name) == component and "lm_head" not in name)
    save_file({n: t for n, t in weights.items() if n != gone}, other / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(other)
    with pytest.raises(CheckpointError, match=f"{other} lacks 1 weights"):
        load_model(opened)
    if component == "vision":
        load_model(opened, vision=False)
        return
    with pytest.raises(CheckpointError, match=f"{other} lacks 1 weights"):
        load_model(opened, vision=False)


def test_a_projector_is_probed_without_weights(saved):
    family, folder = saved
    opened, columns = open_checkpoint(folder), tiny.media(family)
    model = load_model(opened)
    with torch.no_grad(), capture_features(model) as features:
        image_outputs(model, columns)
    state = torch.get_rng_state()
    found = probe_cuts(opened.config, columns)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shapes == cut_shapes(features)
    assert found.tokens == sum(tiny.image_tokens(model, columns))


def pair(tmp_path, families, visions=({}, {}), columns=None):
    """Two opened checkpoints, and media of an image for each."""
    sides = [
        open_checkpoint(tiny.write_checkpoint(family, tmp_path / who, seed, vision=vision))
        for who, seed, family, vision in zip(("teacher", "student"), (1, 2), families, visions, strict=True)
    ]
    return (*sides, columns or tuple(tiny.one_image(family, tiny.media(family)) for family in families))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_onevision", "paligemma"])
def test_two_models_of_a_family_fit(family, tmp_path):
    teacher, student, media = pair(tmp_path, (family, family))
    check_compatible(teacher, student, switch=True, media=media)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "smolvlm"])
def test_another_width_needs_an_adapter(family, tmp_path):
    teacher, student, media = pair(tmp_path, (family, family), ({}, {"hidden_size": 48}))
    with pytest.raises(
        CheckpointError, match=r"\(width \d+\).*\(width\s\d+, at .*\).*--switch-adapter linear"
    ) as caught:
        check_compatible(teacher, student, switch=True, media=media)
    assert str(teacher.path) in str(caught.value) and str(student.path) in str(caught.value)
    check_compatible(teacher, student, switch=True, adapter=True, media=media)
    check_compatible(teacher, student, switch=False)


def test_another_number_of_patches_is_told_with_both_sides(tmp_path):
    one = tiny.one_image("qwen2_5_vl", tiny.media("qwen2_5_vl"))
    less = {"pixel_values": one["pixel_values"][:16], "image_grid_thw": torch.tensor([[1, 4, 4]])}
    teacher, student, media = pair(tmp_path, ("qwen2_5_vl", "qwen2_5_vl"), columns=(one, less))
    with pytest.raises(CheckpointError, match="becomes 48 vision features for the teacher and 16 for the student"):
        check_compatible(teacher, student, switch=True, adapter=True, media=media)


def test_two_families_do_not_fit(tmp_path):
    teacher, student, media = pair(tmp_path, ("qwen3_vl", "qwen2_5_vl"))
    with pytest.raises(
        CheckpointError, match=r"A qwen3_vl reads them at .*deepstack.*a qwen2_5_vl gives them at visual\.merger"
    ):
        check_compatible(teacher, student, switch=True, media=media)


def test_a_mixture_of_experts_teaches_only(tmp_path):
    teacher, student, media = pair(tmp_path, ("qwen3_vl_moe", "qwen3_vl_moe"))
    with pytest.raises(CheckpointError, match=r"student is a qwen3_vl_moe, which only teaches here"):
        check_compatible(teacher, student, switch=True, media=media)


def test_the_logit_map_is_part_of_the_teachers_identity(saved):
    family, folder = saved
    identity = teacher_identity(open_checkpoint(folder))
    assert set(identity) - {"logit_map"} == {"config", "vision", "projector", "language"}
    assert identity.get("logit_map") == ("scale 1, soft-cap 3" if family == "paligemma2" else None)


def test_image_modes_are_for_llava(saved):
    opened = open_checkpoint(saved[1])
    assert with_image_mode(opened, "own") is opened
    with pytest.raises(ConfigError, match="--image-mode square makes images square for a Llava"):
        with_image_mode(opened, "square")


def test_a_language_model_whose_logits_are_scaled_is_refused(tmp_path):
    folder = tiny.write_checkpoint("llava_next", tmp_path / "ckpt", 1)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "granite", "logits_scaling": 8.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{folder}: its language model .granite. asks for logits_scaling = 8.0"):
        open_checkpoint(folder)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packing_is_tested_with_an_image(family):
    model, media = tiny.build(family, 1), tiny.one_image(family, tiny.media(family))
    if not family_of(model.config).packs:
        with pytest.raises(ConfigError, match=r"--packing: .*; leave --packing out"):
            check_packing(model.config, "here")
        return
    enable_packing_in(model.train(), "here", media)
    assert model.training
    assert uses_block_attention(language_model_of(model)) == family_of(model.config).causal


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_a_model_that_mixes_samples_is_refused(family, monkeypatch):
    monkeypatch.setattr(
        "switchkd.models.packing.positions_in_rows",
        lambda mask, source: torch.arange(source.shape[1]).expand(source.shape),
    )
    model, media = tiny.build(family, 1), tiny.one_image(family, tiny.media(family))
    with pytest.raises(ConfigError, match=f"--packing: here .{family}. does not keep samples of one row apart"):
        enable_packing_in(model, "here", media)


def test_heads_know_their_soft_cap(saved):
    family, folder = saved
    opened = open_checkpoint(folder)
    assert lm_head_of(load_model(opened, vision=False)).logit_map.softcap == (3.0 if family == "paligemma2" else None)
