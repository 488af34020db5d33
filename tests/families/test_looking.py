"""`data check`, `data show`, `chat` and `attend` in other families than Llava: images of several numbers of tokens."""

import families as tiny
import numpy as np
import pytest
import tiny as llavas
import torch
from click.testing import CliRunner
from family_batches import own_inputs
from PIL import Image

from switchkd.cli.main import main
from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template
from switchkd.data.samples import Sample, Status
from switchkd.errors import CheckpointError, ConfigError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.families import MEDIA
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.reporting.attention import AttentionProbe
from switchkd.pipelines.reporting.token_grid import grid_of_image
from switchkd.positions import predicting_rows
from switchkd.printable import printable

QUESTION = "what is the color?"


def run(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert "Traceback" not in done.output
    return done


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl", "llava_onevision", "gemma3"])
def place(request, tmp_path_factory):
    """(family, checkpoint, data file of three rows, the second without an image)."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny.write_checkpoint(request.param, folder / "model", 1)
    data = llavas.data(folder / "data", llavas.rows(3, text_only=(1,)))
    llavas.image(folder / "data/images/002.png", 3, size=(40, 16))
    return request.param, checkpoint, data


def token_counts(checkpoint, data):
    """(tokens, image tokens) of each row, as they are encoded for a model."""
    from switchkd.data.samples import SampleFile

    encoder = SampleEncoder(
        open_checkpoint(checkpoint), load_template("qa"), data.parent / "images", 2048
    )  # opened anew, so that nothing is cached
    ids = [encoder.encode(sample).input_ids for sample in SampleFile(data)]
    return [(len(row), int((row == encoder.image_token_id).sum())) for row in ids]


def test_lengths_are_those_of_the_images(place):
    _, checkpoint, data = place
    counts = token_counts(checkpoint, data)
    words = ("--model", checkpoint, "--template", "qa", "--images", data.parent / "images")
    checked = run("data", "check", data, *words)
    assert checked.exit_code == 0, checked.output
    assert (
        f"longest {max(tokens for tokens, _ in counts):,}" in checked.stdout and "would be skipped: 0" in checked.stdout
    )
    shown = run("data", "show", data, *words)
    for tokens, of_image in counts:
        assert f"{tokens:,} tokens, {of_image:,} of the image" in shown.stdout


def test_without_a_folder_a_made_up_image_stands_in(place):
    _, checkpoint, data = place
    shown = run("data", "show", data, "--model", checkpoint, "--template", "qa").stdout
    assert shown.count("of a made-up image (pass --images: their number depends on the image)") == 2
    assert "0 of the image" in shown  # the row without one


def test_a_missing_image_is_told(place):
    _, checkpoint, data = place
    llavas.image(data.parent / "other/of-another-set.png", 0)
    shown = run("data", "show", data, "--model", checkpoint, "--template", "qa", "--images", data.parent / "other")
    assert shown.exit_code == 0 and shown.stdout.count("no image") >= 2
    assert run("data", "show", data, "--model", checkpoint, "--images", data.parent / "nowhere").exit_code == 2


@pytest.mark.parametrize("template", ["qa", "chat"])
def test_chat_answers_as_eval_does(place, template):
    _, folder, data = place
    image = data.parent / "images/000.png"
    done = run("chat", "--model", folder, "--image", image, "--question", QUESTION, "--template", template,
               "--max-new-tokens", 6)  # fmt: skip
    assert done.exit_code == 0, done.output
    checkpoint = open_checkpoint(folder)
    loaded = load_template(template, checkpoint)
    encoder = SampleEncoder(checkpoint, loaded, None, 2048)
    prompt = encoder.encode_turns([(QUESTION, "")], [image.read_bytes()], ["x"])
    (answer,) = GreedyGenerator(load_model(checkpoint), encoder, loaded, 6).answer([prompt])
    assert answer and printable(answer) in done.stdout


# Width and height that the processor keeps, and rows × columns of the image's tokens.
SIZES = {"qwen2_5_vl": ((24, 16), (2, 3)), "qwen3_5": ((24, 16), (2, 3)), "internvl": ((16, 16), (2, 2)),
         "gemma3": ((16, 16), (2, 2)), "paligemma": ((16, 16), (4, 4))}  # fmt: skip


@pytest.mark.parametrize("family", SIZES)
def test_a_map_is_the_definition(family, tmp_path):
    """With loops, from the attentions of the model's own forward pass; the picture is the image, whose size is kept."""
    size, grid = SIZES[family]
    folder = tiny.write_checkpoint(family, tmp_path / "model", 1)
    picture = llavas.image(tmp_path / "a.png", 5, size=size)
    found = AttentionProbe(folder, "qa").map_of(picture, QUESTION, "a red cat")
    assert found.map.shape == grid and found.map.sum() == pytest.approx(1)
    with Image.open(picture) as image:
        np.testing.assert_allclose(found.seen * 255, np.asarray(image), atol=1e-3)

    checkpoint = open_checkpoint(folder)
    encoder = SampleEncoder(checkpoint, load_template("qa"), tmp_path, 256)
    batch = collate([encoder.encode(Sample(0, "", "a.png", [(QUESTION, "a red cat")], "", Status.OK, ""))], 0)
    batch.pop("has_image")
    model = load_model(checkpoint, dtype="float32")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**own_inputs(family, batch), output_attentions=True, use_cache=False).attentions
    places = (batch["input_ids"][0] == checkpoint.image_token_id).nonzero()[:, 0].tolist()
    mass, count = np.zeros(len(places)), 0
    for layer in attentions:
        for head in layer[0].double():
            for row in predicting_rows(batch["labels"])[0].nonzero()[:, 0].tolist():
                mass += [float(head[row, place]) for place in places]
                count += 1
    assert found.share == pytest.approx(mass.sum() / count, rel=1e-5)
    np.testing.assert_allclose(found.map.ravel(), mass / mass.sum(), rtol=1e-5)


# A tiled family, and the features of the tile that shows the image whole among those that its projector makes.
TILED = {
    "llava_next": slice(0, 16),
    "llava_onevision": slice(0, 16),
    "internvl": slice(-4, None),
    "idefics3": slice(-4, None),
}


@pytest.mark.parametrize("family", TILED)
def test_the_map_of_a_tiled_image_is_that_of_the_tile_which_shows_it_whole(family, tmp_path):
    folder = tiny.write_checkpoint(family, tmp_path / "model", 1)
    picture = llavas.image(tmp_path / "a.png", 5, size=(60, 16))
    probe = AttentionProbe(folder, "qa")
    found = probe.map_of(picture, QUESTION, "a red cat")
    checkpoint, model = open_checkpoint(folder), load_model(open_checkpoint(folder), dtype="float32")
    encoder = SampleEncoder(checkpoint, load_template("qa"), tmp_path, 1 << 14)
    encoded = encoder.encode(Sample(0, "", "a.png", [(QUESTION, "a red cat")], "", Status.OK, ""))
    batch = collate([encoded], 0)
    batch.pop("has_image")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**own_inputs(family, batch), output_attentions=True, use_cache=False).attentions
        # Only the features of that tile change with its pixels.
        place = 0 if TILED[family].start == 0 else -1
        tiles = batch["pixel_values"].flatten(0, -4)
        assert len(tiles) > 1
        changed = batch["pixel_values"].clone()
        changed.reshape(tiles.shape)[place] += 1
        columns = {name: value for name, value in batch.items() if name in MEDIA}
        made = [
            torch.cat(list(model.model.get_image_features(**columns | more, return_dict=True).pooler_output))
            for more in ({}, {"pixel_values": changed})
        ]
        moved = (made[1] - made[0]).reshape(-1, made[0].shape[-1]).abs().amax(-1) > 1e-6
    on_image = batch["input_ids"][0] == checkpoint.image_token_id
    assert moved.nonzero()[:, 0].tolist() == list(range(len(moved)))[TILED[family]]
    rows = predicting_rows(batch["labels"])[0]
    mass = torch.stack([layer[0].double() for layer in attentions])[:, :, rows][..., on_image].mean(dim=(0, 1, 2))
    assert found.share == pytest.approx(float(mass.sum()), rel=1e-5)
    overview = mass[TILED[family]]
    np.testing.assert_allclose(found.map.ravel(), overview / overview.sum(), rtol=1e-5)
    processor = checkpoint.image_processor
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    np.testing.assert_allclose(found.seen, (tiles[place] * std + mean).clamp(0, 1).permute(1, 2, 0), atol=1e-6)


def test_tokens_on_no_grid_are_refused(tmp_path):
    checkpoint = open_checkpoint(tiny.write_checkpoint("internvl", tmp_path / "model", 1))
    with pytest.raises(
        CheckpointError, match="is a internvl.*6 tokens in 1 tiles, which lie on no grid.*qwen2_5_vl.*internvl"
    ):
        grid_of_image(checkpoint, {"pixel_values": torch.zeros(1, 3, 16, 16)}, 6)


def test_linear_attention_has_no_weights(tmp_path):
    folder = tiny.write_checkpoint("qwen3_5", tmp_path / "model", 1)
    with pytest.raises(ConfigError, match="layer 1 of .* has linear attention.*with some of 3"):
        AttentionProbe(folder, "qa", (1,))
    assert AttentionProbe(folder, "qa", (-1,)).layers == AttentionProbe(folder, "qa").layers == [3]
