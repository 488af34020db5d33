"""LDPv2 against a loop, and a student that has it through both stages."""

import json
from dataclasses import replace

import pytest
import reference
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from switchkd.cli.main import main
from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import check_compatible, open_checkpoint
from switchkd.models.projectors import LDPv2, SwitchLlavaConfig, SwitchLlavaForConditionalGeneration
from switchkd.models.vlm import load_model
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train


def projector(grid, width=6, features=10):
    config = SwitchLlavaConfig(
        vision_config=tiny.vision_config("clip", width=features),
        text_config=tiny.text_config(width=width),
        projector_grid=grid,
    )
    torch.manual_seed(0)
    return LDPv2(config).double()


@pytest.mark.parametrize(("side", "grid"), [(24, 12), (4, 2), (5, 3), (3, 1), (2, 2), (7, 5)])
def test_ldpv2_equals_the_loop(side, grid):
    ldp = projector(grid)
    features = torch.randn(2, side * side, 10, dtype=torch.float64)
    found = ldp(features)
    assert found.shape == (2, grid**2, 6)
    expected = torch.stack([reference.ldpv2(image, ldp.state_dict(), grid) for image in features])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_published_size():
    """CLIP-L/14-336 with Qwen2.5-1.5B: 24×24 features become 144 tokens, and the parameters are counted by hand."""
    ldp = projector(12, width=1536, features=1024)
    assert ldp(torch.zeros(1, 576, 1024, dtype=torch.float64)).shape == (1, 144, 1536)
    assert sum(p.numel() for p in ldp.parameters()) == (1024 + 1) * 1536 + (1536 + 1) * 1536 + (9 + 1) * 1536


def test_gradients_reach_every_parameter_and_the_features():
    ldp, features = projector(2), torch.randn(1, 16, 10, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(ldp, (features,))
    ldp(features).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ldp.parameters())


def test_features_that_are_no_square():
    with pytest.raises(ValueError, match="square grid of features, got 15"):
        projector(2)(torch.zeros(1, 15, 10, dtype=torch.float64))


VISION = {"kind": "clip", "width": 16, "size": 32}  # 4×4 patches and a class token


def ldp_checkpoint(folder, seed, width, **changed):
    build = {"vision": tiny.vision_config(**VISION), "layer": -2, "strategy": "default", "grid": 2} | changed
    return tiny.checkpoint(folder, seed, width=width, **build)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldp")
    return ldp_checkpoint(folder / "teacher", 0, 24, tied=False), ldp_checkpoint(folder / "student", 1, 16)


def test_a_checkpoint_opens_with_what_the_document_says(pair):
    opened = open_checkpoint(pair[0])
    assert (opened.image_tokens, opened.feature_tokens, opened.feature_width) == (4, 16, 16)
    ours = load_model(opened)
    assert tiny.vision_features(ours, torch.zeros(2, 3, 32, 32)).shape == (2, 16, 16)
    for kind in (SwitchLlavaForConditionalGeneration, AutoModelForImageTextToText):
        model, report = kind.from_pretrained(pair[0], output_loading_info=True)
        assert type(model) is SwitchLlavaForConditionalGeneration
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert json.loads((pair[0] / "config.json").read_text())["model_type"] == "switch_llava"
    assert "auto_map" not in (pair[0] / "config.json").read_text()


def test_the_teacher_without_vision_equals_the_whole_one(pair):
    opened = open_checkpoint(pair[0])
    whole, blind = load_model(opened), load_model(opened, vision=False)
    assert blind.model.vision_tower is None
    features = torch.randn(1, 16, 16)
    projected = [model.model.multi_modal_projector(features) for model in (whole, blind)]
    torch.testing.assert_close(*projected, rtol=0, atol=0)
    ids = torch.tensor([[5, 6, 7, 4]])
    torch.testing.assert_close(blind(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=0)


def test_both_stages_and_evaluation(pair, tmp_path):
    teacher, student = pair
    data = tiny.data(tmp_path / "data", tiny.rows(6, text_only=(1,), two_turns=(2,)))
    common = {"teacher": teacher, "data": data, "images": tmp_path / "data/images", "batch_size": 3}
    cache_teacher(CacheOptions(out=tmp_path / "s.zarr", template="qa", payload="hidden", **common))
    options = TrainOptions(
        student=student, output=tmp_path / "run", cache=tmp_path, steps=4, lr=1e-2, log_every=1, save_every=2, **common
    )
    done = train(options)
    assert all(done.losses[f"loss_{part}"] > 1e-5 for part in ("ce", "align", "vsd"))
    before, after = load_file(student / "model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    assert before.keys() == after.keys()
    for part in ("vision_tower", "linear_1", "position", "language_model"):
        assert any(not torch.equal(before[name], after[name]) for name in before if part in name), part
    whole = replace(options, output=tmp_path / "again")
    (tmp_path / "again").mkdir()
    (tmp_path / "run/checkpoint-2").rename(tmp_path / "again/checkpoint-2")
    train(whole)  # goes on from step 2
    for name, tensor in load_file(tmp_path / "again/model.safetensors").items():
        assert torch.equal(tensor, after[name]), name
    words = ("eval", "--model", "run", "--data", "data/data.json", "--images", "data/images", "--output", "out")
    words = [f"{tmp_path}/{word}" if word[0] in "rdo" else word for word in words[1:]]
    judged = CliRunner().invoke(main, ["eval", *words, "--template", "qa"])
    assert judged.exit_code == 0, judged.output
    assert "over 7 questions" in judged.output


def test_a_pooled_and_an_unpooled_student_share_the_token_count_not_the_switch(pair, tmp_path):
    """Four tokens of sixteen features, or of four: Align can compare them, the teacher's projector cannot take both."""
    plain = tiny.checkpoint(
        tmp_path / "m", 2, width=16, vision=tiny.vision_config("clip", width=16), layer=-2, strategy="default"
    )
    check_compatible(open_checkpoint(pair[0]), open_checkpoint(plain), switch=False)
    with pytest.raises(CheckpointError, match="student's 4 vision features.*takes 16"):
        check_compatible(open_checkpoint(pair[0]), open_checkpoint(plain), switch=True)


def test_a_tower_without_a_square_grid_is_refused_before_weights_are_read(tmp_path):
    folder = ldp_checkpoint(tmp_path / "m", 0, 16, strategy="full")
    with pytest.raises(CheckpointError, match="LDPv2 pools a square grid of features, the tower gives 17"):
        open_checkpoint(folder)
