"""The tower that names what patches show: its classes, a short training, and a checkpoint that starts from it."""

import shutil
from functools import partial

import drawn_packages
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from switchkd.errors import ConfigError
from switchkd.fingerprints import hash_json
from switchkd.pipelines.ablation import small_models
from switchkd.pipelines.ablation.small_models import check_small_models, untrained_path, write_untrained
from switchkd.pipelines.demo import emoji_models
from switchkd.pipelines.emoji_vqa import concepts, models, tower, vocabulary
from switchkd.pipelines.emoji_vqa.build import styles
from switchkd.pipelines.emoji_vqa.drawings import read_drawings
from switchkd.pipelines.emoji_vqa.packages import fetch
from switchkd.pipelines.emoji_vqa.scenes import COLORS, DESCRIBE, SceneMaker, Shown, caption_of

pytest.importorskip("resvg_py", reason="drawings are rendered with resvg-py: extra `demo`")
pytest.importorskip("matplotlib", reason="numbers are set in matplotlib's fonts: extra `demo`")

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 48,
    "patch_size": 12,
}
LANGUAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture(scope="module", autouse=True)
def own_concepts():
    """The concepts that were drawn here, in place of the list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "kind_of", drawn_packages.kinds)
        patch.setattr(vocabulary, "kind_of", drawn_packages.kinds)
        yield


def test_classes_of_patches():
    """Later things cover earlier ones; a patch belongs to what covers its centre."""
    shown = [Shown("cat", "red", (0, 0, 24, 12)), Shown("dog", None, (12, 0, 30, 24))]
    found = tower.labels_of(shown, {"cat": 0, "dog": 1}, side=4, patch=12)
    red, none = sorted(COLORS).index("red"), len(COLORS)
    assert found[0].tolist() == [[0, 1, 2, 2], [2, 1, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert found[1].tolist() == [[red, none, none, none]] + [[none] * 4] * 3


def test_a_scene_tells_where_its_things_are(packages):
    """The box of a drawing on a card is inside the card's colour; digits and bars are there as often as they are drawn."""
    kinds = drawn_packages.kinds()
    drawings = read_drawings(fetch(*packages), kinds, 96)
    maker = SceneMaker(drawings, kinds, styles(kinds)["val"], 96, "test")
    cards = bars = digits = 0
    while not (cards and bars and digits):
        image, asked = maker.make()
        answers = {one.kind: one.answer for one in asked}
        pixels = np.asarray(image, int)
        for one in maker.shown:
            left, top, right, bottom = (round(edge) for edge in one.box)
            if one.thing in kinds and one.color is not None:  # the card is three pixels larger on each side
                assert np.abs(pixels[(top + bottom) // 2, left - 2] - COLORS[one.color]).max() < 40
                cards += 1
            elif one.thing.startswith("bar of"):
                assert (pixels[bottom - 3, (left + right) // 2] == COLORS[one.color]).all()
                bars += 1
        if "read" in answers:
            assert [one.thing for one in maker.shown] == [f"digit {digit}" for digit in answers["read"].split()]
            digits += 1
        if "value" in answers:
            assert f"bar of {answers['value']}" in {one.thing for one in maker.shown}


def test_a_caption_is_in_reading_order():
    """Rows from top to bottom, each from left to right, with colours; digits of a sign and bars need no row."""
    owl, cat, dog = (
        Shown("owl", "gray", (5, 60, 40, 95)),
        Shown("cat", "red", (5, 5, 40, 40)),
        Shown("dog", None, (60, 9, 95, 44)),
    )
    assert caption_of([owl, dog, cat], 96) == "top red cat dog bottom gray owl"
    assert caption_of([owl], 96) == "gray owl"
    digits = [Shown(f"digit {n}", "blue", (20 * n, 30, 20 * n + 15, 60)) for n in (3, 1)]
    assert caption_of(digits, 96) == "blue sign 1 3"
    bars = [Shown("bar of two", "red", (40, 70, 60, 90)), Shown("bar of nine", "pink", (10, 10, 30, 90))]
    assert caption_of(bars, 96) == "pink nine red two"


def test_a_tower_is_trained_and_a_model_starts_from_it(packages, tmp_path, monkeypatch):
    """The weights change, the same in two runs, and are those of the checkpoint's tower."""
    monkeypatch.setattr(tower, "CHUNK", 8)
    monkeypatch.setattr(tower, "PACKAGES", packages[1])
    for name, steps in (("one", 2), ("again", 2), ("more", 3)):
        tower.train_tower(
            packages[0], tmp_path / f"{name}.safetensors", vision=VISION, images=16, steps=steps, batch=8, workers=0
        )
    one, again, more = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "again", "more"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], more[name]) for name in one)
    monkeypatch.setattr("switchkd.pipelines.ablation.small_models.TOWER_WEIGHTS", tmp_path / "one.safetensors")
    spec = {"vision": VISION, "language": LANGUAGE, "tower": "pretrained"}
    write_untrained(tmp_path / "model", spec, 3, "emoji-vqa")
    saved = load_file(tmp_path / "model/model.safetensors")
    of_tower = {name: tensor for name, tensor in saved.items() if "vision_tower" in name}
    assert len(of_tower) == len(one)
    for name, tensor in of_tower.items():
        key = next(key for key in one if name.endswith(key))
        assert torch.equal(tensor, one[key].float())


@pytest.mark.parametrize("name", models.SHIPPED)
def test_the_models_that_ship_can_be_made(name, tmp_path, monkeypatch):
    """From their float16 weights; the student's tower is the one that ships."""
    monkeypatch.setattr(vocabulary, "kind_of", concepts.kind_of)
    path = untrained_path(tmp_path, name, {"shipped": name}, 0)
    write_untrained(path, {"shipped": name}, 0, "emoji-vqa")
    saved = load_file(path / "model.safetensors")
    assert all(torch.equal(tensor.half().float(), tensor) for tensor in saved.values())
    tower = load_file(models.TOWER_WEIGHTS)["encoder.layers.0.self_attn.q_proj.weight"].float()
    assert any(torch.equal(tensor, tower) for tensor in saved.values()) == (name == "student")


def test_other_weights_are_another_model(tmp_path, monkeypatch):
    """A cell's name holds what ships, so that no result of other weights is taken for its own."""
    for spec, weights in (({"shipped": "teacher"}, "teacher"), ({"tower": "pretrained"}, "tower")):
        before = untrained_path(tmp_path, "m", spec, 0)
        other = tmp_path / f"{weights}.safetensors"
        other.write_bytes(b"other")
        if weights == "tower":
            monkeypatch.setattr("switchkd.pipelines.ablation.small_models.TOWER_WEIGHTS", other)
        else:
            monkeypatch.setitem(small_models.SHIPPED_WITH_EMOJI_VQA, "teacher", ({}, other))
        assert untrained_path(tmp_path, "m", spec, 0) != before
    assert untrained_path(tmp_path, "m", {"shipped": True}, 0).name == "m-" + hash_json([{"shipped": True}, 0])[:8]


def test_the_tower_that_ships_has_the_shape_that_is_told():
    """Its file fits `models.TOWER`, and no other shape is accepted."""
    sizes = {name: tuple(tensor.shape) for name, tensor in load_file(models.TOWER_WEIGHTS).items()}
    width, patch = models.TOWER["hidden_size"], models.TOWER["patch_size"]
    assert (width, 3, patch, patch) in sizes.values()
    assert ((models.TOWER["image_size"] // patch) ** 2, width) in sizes.values()
    spec = {"vision": VISION, "language": LANGUAGE, "tower": "pretrained"}
    with pytest.raises(ConfigError, match="the tower that ships has vision"):
        check_small_models(None, {"share": 0.1}, {"small": spec})
    with pytest.raises(ConfigError, match="with emoji_vqa maybe tower"):
        check_small_models(None, {"share": 0.1}, {"small": spec | {"tower": "other"}})
    check_small_models(None, {"share": 0.1}, {"small": spec | {"vision": models.TOWER}})


def test_every_word_is_known(packages):
    """Questions, answers and captions of many scenes consist of words of the vocabulary."""
    kinds, known = drawn_packages.kinds(), set(vocabulary.vocabulary())
    drawings = read_drawings(fetch(*packages), kinds, 96)
    for name, style in styles(kinds).items():
        maker = SceneMaker(drawings, kinds, style, 48, name)
        for _ in range(40):
            _, asked = maker.make()
            said = [f"{one.question} {one.answer}" for one in asked]
            said += [DESCRIBE, caption_of(maker.shown, 48)]
            assert set(vocabulary.words_of(" ".join(said))) <= known


@pytest.mark.slow
def test_the_models_of_the_pilot_are_trained(packages, tmp_path, monkeypatch):
    """In few steps, on few images: the tower again, a teacher from it, and a student whose tower is the pretrained one."""
    from switchkd.pipelines.emoji_vqa import build

    shutil.copytree(packages[0], tmp_path / "models/packages")
    monkeypatch.setattr(build, "kind_of", drawn_packages.kinds)
    monkeypatch.setattr(build.build, "__defaults__", (packages[1],))
    monkeypatch.setattr(tower, "PACKAGES", packages[1])
    monkeypatch.setattr(emoji_models, "train_tower", partial(tower.train_tower, images=8, steps=2, batch=4))
    monkeypatch.setattr(tower, "CHUNK", 4)
    monkeypatch.setattr(emoji_models, "SHARE", 0.01)
    for name in ("TEACHER_PT_STEPS", "TEACHER_STEPS", "STUDENT_PT_STEPS", "STUDENT_STEPS"):
        monkeypatch.setattr(emoji_models, name, 2)
    start, *trained = emoji_models.train_models(tmp_path / "models", tower_again=True)
    key = "encoder.layers.0.self_attn.q_proj.weight"
    first = load_file(start)[key].float()
    for weights, same in zip(trained, (False, True), strict=True):
        saved = load_file(weights)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
        mine = next(tensor for name, tensor in saved.items() if name.endswith(key) and "vision" in name)
        assert torch.equal(mine.float(), first) == same
