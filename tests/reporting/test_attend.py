"""`switchkd attend`: the maps are what the definition says, on the model's own patches; the pictures show them."""

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("matplotlib", reason="pictures need the extra `viz`")
pytest.importorskip("jinja2", reason="pages need the extra `viz`")

from switchkd.cli.main import main
from switchkd.data.samples import BadSample
from switchkd.errors import ConfigError, InputError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.reporting import attend as attend_module
from switchkd.pipelines.reporting.attend import attend
from switchkd.pipelines.reporting.attention import AttentionProbe, answer_to_image, overlap
from switchkd.pipelines.reporting.options import AttendOptions
from switchkd.pipelines.reporting.token_grid import Grid, patch_grid
from switchkd.positions import predicting_rows

QUESTION = "what color is it ?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An image of the size that the tiny towers take, so that no resizing stands between file and pixels."""
    return tiny.image(tmp_path_factory.mktemp("image") / "a.png", 7, size=(16, 16))


def test_a_case_computed_by_hand():
    """One layer, two heads, four tokens: image, image, question, answer. Rows 1 and 2 predict tokens 2 and 3."""
    one = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]]
    two = [[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0.6, 0.1, 0.3, 0], [0.25, 0.25, 0.25, 0.25]]
    attention = torch.tensor([[one, two]], dtype=torch.float64)
    on_image = torch.tensor([True, True, False, False])
    only_the_answer = torch.tensor([False, False, True, False])
    # (0.2 + 0.6) / 2 and (0.3 + 0.1) / 2
    assert answer_to_image(attention, only_the_answer, on_image).tolist() == pytest.approx([0.4, 0.2])
    both = torch.tensor([False, True, True, False])
    # (0.5 + 0.2 + 0.25 + 0.6) / 4 and (0.5 + 0.3 + 0.75 + 0.1) / 4
    assert answer_to_image(attention, both, on_image).tolist() == pytest.approx([0.3875, 0.4125])


def naive(folder, picture, answer, layers):
    """The definition with loops, from the model's own attentions: (share, map [side, side])."""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, dtype="float32")
    model.set_attn_implementation("eager")
    words = tiny.WORDS
    # template qa: "<image>\n{question}\n{answer}{eos}"-like; taken from the encoder, since templates have tests of their own
    from switchkd.data.encoded import collate
    from switchkd.data.encoding import SampleEncoder
    from switchkd.data.load_template import load_template
    from switchkd.data.samples import Sample, Status

    encoder = SampleEncoder(checkpoint, load_template("qa"), picture.parent, 256)
    encoded = encoder.encode(Sample(0, "", picture.name, [(QUESTION, answer)], "", Status.OK, ""))
    batch = collate([encoded], 0)
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], output_attentions=True)
    rows = predicting_rows(batch["labels"])[0].nonzero()[:, 0].tolist()
    ids = batch["input_ids"][0].tolist()
    image = [place for place, token in enumerate(ids) if words[token] == "<image>"]
    mass = np.zeros(len(image))
    count = 0
    for layer in layers:
        for head in out.attentions[layer][0].double():
            for row in rows:
                assert float(head[row].sum()) == pytest.approx(1, abs=1e-5)  # a softmax over what the row may see
                assert float(head[row, row + 1 :].sum()) == 0
                mass += [float(head[row, place]) for place in image]
                count += 1
    mass /= count
    return mass.sum(), (mass / mass.sum()).reshape(2, 2)


@pytest.mark.parametrize("layers", ((), (1,), (-2, 0)))
def test_a_look_is_the_definition(teacher, picture, layers):
    look = AttentionProbe(teacher, "qa", layers).map_of(picture, QUESTION, "red")
    share, expected = naive(teacher, picture, "red", {(): (0, 1), (1,): (1,), (-2, 0): (0,)}[layers])
    assert look.map.shape == (2, 2)  # 16 pixels, patches of 8
    assert look.map.sum() == pytest.approx(1)
    assert look.share == pytest.approx(share, rel=1e-5) and 0 < look.share < 1
    np.testing.assert_allclose(look.map, expected, rtol=1e-5)


def test_the_models_own_answer_is_its_greedy_one(teacher, picture):
    probe = AttentionProbe(teacher, "qa", max_new_tokens=3)
    own = probe.map_of(picture, QUESTION)
    assert 1 <= len(own.answer.split()) <= 3
    given = probe.map_of(picture, QUESTION, own.answer)
    np.testing.assert_array_equal(own.map, given.map)


def test_the_picture_is_what_the_model_saw(teacher, picture):
    seen = AttentionProbe(teacher, "qa").map_of(picture, QUESTION, "red").seen
    with Image.open(picture) as image:
        np.testing.assert_allclose(seen * 255, np.asarray(image), atol=1e-3)


TOWERS = {
    "siglip, every patch": (("siglip", "full"), Grid(2, 2)),
    "siglip, first patch dropped": (("siglip", "default"), Grid(2, 2, missing=1)),
    "clip, class token dropped": (("clip", "default"), Grid(2, 2)),
    "clip, class token kept": (("clip", "full"), Grid(2, 2, extra=1)),
}


@pytest.mark.parametrize("name", TOWERS)
def test_the_map_has_the_towers_patches(name, picture, tmp_path):
    (kind, strategy), grid = TOWERS[name]
    folder = tiny.checkpoint(tmp_path / "m", 0, vision=tiny.vision_config(kind), layer=-2, strategy=strategy)
    assert patch_grid(open_checkpoint(folder)) == grid
    look = AttentionProbe(folder, "qa").map_of(picture, QUESTION, "red")
    assert look.map.shape == (2, 2)
    assert np.isnan(look.map[0, 0]) == bool(grid.missing)
    assert np.nansum(look.map) == pytest.approx(1)


def test_tokens_are_placed_in_reading_order():
    np.testing.assert_allclose(Grid(2, 2).place(np.arange(4.0)), [[0, 1 / 6], [2 / 6, 3 / 6]])
    np.testing.assert_allclose(Grid(1, 2, before=1, after=1).place(np.arange(4.0)), [[1 / 3, 2 / 3]])
    np.testing.assert_allclose(Grid(2, 2, missing=1).place(np.arange(3.0)), [[np.nan, 0], [1 / 3, 2 / 3]])


def test_overlap():
    one, other = np.array([[0.5, 0.5, 0, 0]]), np.array([[0, 0.25, 0.75, 0]])
    assert overlap(one, one) == 1
    assert overlap(one, other) == 0.25
    assert overlap(np.array([[np.nan, 1.0]]), np.array([[np.nan, 1.0]])) == 1
    assert overlap(one, other.T) is None


def test_the_panels_show_the_maps(teacher, student, picture, tmp_path):
    """Every pixel of a patch is tinted by its patch alone, and a stronger patch is lighter."""
    from switchkd.pipelines.reporting.attend import _overlaid, _scale

    (row,) = attend(AttendOptions(student, [(picture, QUESTION)], teacher, template="qa", out=tmp_path))
    assert [panel.name for panel in row.panels] == ["teacher", "student"]
    assert row.panels[0].overlap is None and 0 < row.panels[1].overlap <= 1
    for panel in row.panels:
        mixed = _overlaid(panel, *_scale(row))
        tint = mixed - 0.35 * panel.attention.seen.mean(axis=2, keepdims=True)
        blocks = tint.reshape(2, 8, 2, 8, 3).transpose(0, 2, 1, 3, 4).reshape(4, 64, 3)
        assert np.ptp(blocks, axis=1).max() < 1e-6
        lightness = blocks.mean(axis=(1, 2))
        assert np.argsort(lightness).tolist() == np.argsort(panel.attention.map.ravel()).tolist()
    # The scale shows differences: over the panels it reaches from the least to the largest patch.
    least, largest = _scale(row)
    densities = np.concatenate([4 * panel.attention.map.ravel() for panel in row.panels])
    assert (least, largest) == (densities.min(), densities.max()) and least > 0
    assert f"{least:.2f}" in (tmp_path / "attend.html").read_text()


def run(picture, teacher, student, out, *more):
    words = ["attend", "--model", student, "--teacher", teacher, "--baseline", student, "--image", picture]
    words += ["--question", "<b>what</b> is it ?", "--template", "qa", "--out", out, *more]
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command(picture, teacher, student, tmp_path):
    done = run(picture, teacher, student, tmp_path, "--image", picture, "--question", QUESTION, "--layer", -1)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("% on the image") == 6
    with Image.open(tmp_path / "attend.png") as image:
        assert image.width > image.height  # the panels of a question stand side by side
    page = (tmp_path / "attend.html").read_text()
    assert page.count("<figure>") == 8 and "&lt;b&gt;what" in page and "<b>what" not in page
    assert "layers -1" in page


def test_mistakes_are_told(picture, teacher, student, tmp_path):
    assert "each --question goes with an --image" in run(picture, teacher, student, tmp_path, "--image", picture).output
    done = run(picture, teacher, student, tmp_path, "--layer", 9)
    assert done.exit_code == 2 and "has layers 0 … 1" in done.output
    done = run(tmp_path / "nowhere.png", teacher, student, tmp_path)
    assert done.exit_code == 2 and "no image" in done.output and "Traceback" not in done.output
    with pytest.raises(ConfigError, match="at least one"):
        attend(AttendOptions(student, []))
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(BadSample, match="image_unreadable"):
        attend(AttendOptions(student, [(tmp_path / "broken.png", "?")], template="qa", out=tmp_path))
    assert issubclass(BadSample, InputError)


def test_captions_stay_within_their_panel():
    """Row 25 of the faults found by outside trials: long names and questions ran over the edge."""
    from matplotlib.textpath import TextPath

    for text in ("word " * 60, "a-very-long-file-name-without-any-space-" * 5 + ".png", "short"):
        lines = attend_module._short(text).split("\n")
        assert len(lines) <= 3
        for line in lines:
            assert TextPath((0, 0), line, size=9).get_extents().width < 3 * 72  # a panel's width in points
