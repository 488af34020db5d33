"""The switch adapter: towers of another width and number of patches teach and learn; nothing of it is in the exported student."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import assert_equal_runs
from transformers import LlavaForConditionalGeneration

from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import CheckpointError, ConfigError
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal
from switchkd.models.checkpoint import check_compatible, open_checkpoint
from switchkd.models.switch import switch_states
from switchkd.models.switch_adapter import SwitchAdapter, grid_side
from switchkd.models.vlm import load_model
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.positions import predicting_rows

TRAINED, HELD_OUT = 24, 8


@pytest.mark.parametrize(("count", "side"), [(728, 27), (729, 27), (576, 24), (575, 24), (4, 2), (3, 2), (1, 1)])
def test_the_grid(count, side):
    assert grid_side(count) == side


@pytest.mark.parametrize("count", (577, 730, 2, 10))
def test_no_grid(count):
    with pytest.raises(ValueError, match="lie on no square grid"):
        grid_side(count)


def bilinear(grid, side):
    """[s, s, d] → [side, side, d] by the definition, for an enlargement: cell centres, weights by distance, edges held."""
    size = len(grid)
    out = torch.zeros(side, side, grid.shape[-1], dtype=grid.dtype)
    for i in range(side):
        for j in range(side):
            y, x = ((k + 0.5) * size / side - 0.5 for k in (i, j))
            for r in range(size):
                for c in range(size):
                    clamped_y, clamped_x = min(max(y, 0), size - 1), min(max(x, 0), size - 1)
                    weight = max(0, 1 - abs(clamped_y - r)) * max(0, 1 - abs(clamped_x - c))
                    out[i, j] += weight * grid[r, c]
    return out


@pytest.mark.parametrize(("sides", "drop"), [((2, 3), (0, 0)), ((3, 5), (0, 0)), ((3, 4), (0, 1)), ((3, 4), (1, 0))])
def test_resampling_starts_as_bilinear(sides, drop):
    counts = [side * side - d for side, d in zip(sides, drop, strict=True)]
    adapter = SwitchAdapter("linear", (counts[0], 4), (counts[1], 4)).double()
    features = torch.randn(2, counts[0], 4, dtype=torch.float64)
    found = adapter(features)
    assert found.shape == (2, counts[1], 4)
    whole = torch.cat([features[:, :1], features], 1) if drop[0] else features
    grids = [bilinear(image.unflatten(0, (sides[0],) * 2), sides[1]) for image in whole]
    expected = torch.stack(grids).flatten(1, 2)[:, drop[1] :]
    torch.testing.assert_close(found, adapter.map(expected))


@pytest.mark.parametrize("kind", ("linear", "mlp"))
def test_shapes_and_gradients(kind):
    adapter = SwitchAdapter(kind, (9, 6), (4, 8)).double()
    features = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    assert adapter(features).shape == (1, 4, 8)
    torch.autograd.gradcheck(adapter, (features,))
    adapter(features).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


PAIRS = {
    "narrower": tiny.vision_config(width=16),
    "narrower, more patches": tiny.vision_config(width=16, size=24),
    "wider, fewer patches": tiny.vision_config(width=48, size=8),
}


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):
    """Samples, the teacher's store of those that are trained on, and the same samples held out."""
    folder = tmp_path_factory.mktemp("adapter")
    every = tiny.rows(TRAINED + HELD_OUT, text_only=(3,))
    tiny.data(folder, every)
    (folder / "data.json").write_text(json.dumps(every[:TRAINED]))
    (folder / "held_out.json").write_text(json.dumps(every[TRAINED:]))
    common = {"teacher": teacher, "data": folder / "data.json", "images": folder / "images"}
    cache_teacher(
        CacheOptions(out=folder / "s.zarr", template="qa", payload="hidden", hidden_dtype="float16", **common)
    )
    return folder


def options(place, teacher, tmp_path, pair, **changed):
    student = tiny.checkpoint(tmp_path / "student", 7, width=16, layers=1, vision=PAIRS[pair])
    settings = {"steps": 30, "batch_size": 6, "lr": 5e-3, "save_every": 15, "log_every": 10, "switch_adapter": "linear"}
    return TrainOptions(
        student=student,
        teacher=teacher,
        data=place / "data.json",
        images=place / "images",
        cache=place / "s.zarr",
        output=tmp_path / "run",
        **(settings | changed),
    )


@torch.no_grad()
def held_out_vsd(place, teacher, student, adapter):
    """VSD, nats per position, on samples that were not trained on."""
    theirs, ours = open_checkpoint(teacher), open_checkpoint(student)
    whole, eyes = load_model(theirs), load_model(ours)
    batches = []
    for opened in (theirs, ours):
        encoder = SampleEncoder(opened, TEMPLATES["qa"], place / "images", 256)
        batches.append(collate([encoder.encode(s) for s in SampleFile(place / "held_out.json")], 0))
    rows = predicting_rows(batches[0]["labels"])
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    expected = whole(pixel_values=batches[0]["pixel_values"], **inputs).logits[rows]
    features = adapter(tiny.vision_features(eyes, batches[1]["pixel_values"]))
    found = whole.lm_head(switch_states(whole, features, **inputs, rows=rows))
    return (Objective().divergence(found, DenseSignal(expected)) / rows.sum()).item()


def adapter_of(kind, teacher, student, folder=None, seed=42):
    torch.manual_seed(seed)
    shapes = [(o.feature_tokens, o.feature_width) for o in map(open_checkpoint, (student, teacher))]
    adapter = SwitchAdapter(kind, *shapes)
    if folder is not None:
        weights = load_file(folder / "switch_adapter.safetensors")
        adapter.load_state_dict({name.removeprefix("switch_adapter."): t for name, t in weights.items()})
    return adapter


@pytest.mark.parametrize(
    ("pair", "kind"), [("narrower", "linear"), ("narrower, more patches", "mlp"), ("wider, fewer patches", "linear")]
)
def test_training_lowers_vsd_on_held_out_samples(place, teacher, tmp_path, pair, kind):
    chosen = options(place, teacher, tmp_path, pair, switch_adapter=kind, vsd_weight=20.0)  # tiny teachers hardly look
    before = held_out_vsd(place, teacher, chosen.student, adapter_of(kind, teacher, chosen.student))
    train(chosen)
    after = held_out_vsd(place, teacher, chosen.output, adapter_of(kind, teacher, chosen.student, chosen.output))
    print(pair, kind, before, after)
    assert after < 0.9 * before


def test_the_exported_student_knows_nothing_of_it(place, teacher, tmp_path):
    chosen = options(place, teacher, tmp_path, "narrower, more patches", steps=2, save_every=1)
    train(chosen)
    for folder in (chosen.output, chosen.output / "checkpoint-2"):
        assert not [name for name in load_file(folder / "model.safetensors") if "adapter" in name]
        assert all(name.startswith("switch_adapter.") for name in load_file(folder / "switch_adapter.safetensors"))
        _, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not report["unexpected_keys"] and not set(report["missing_keys"]) - {"lm_head.weight"}
    before = load_file(chosen.student / "model.safetensors")
    assert before.keys() == load_file(chosen.output / "model.safetensors").keys()


def test_samples_that_share_rows_change_nothing(place, teacher, tmp_path):
    """An image is nine tokens to the student, four to the teacher."""
    plain = options(place, teacher, tmp_path, "narrower, more patches", steps=3, log_every=1)
    train(plain)
    packed = replace(plain, packing=60, output=tmp_path / "packed")
    train(packed)
    assert_equal_runs(plain.output, packed.output)


def test_a_resumed_run_equals_an_uninterrupted_one(place, teacher, tmp_path):
    chosen = options(place, teacher, tmp_path, "narrower, more patches", steps=4, save_every=2)
    train(chosen)
    again = replace(chosen, output=tmp_path / "again")
    again.output.mkdir()
    shutil.copytree(chosen.output / "checkpoint-2", again.output / "checkpoint-2")
    train(again)
    for name in ("model.safetensors", "switch_adapter.safetensors"):
        expected, found = load_file(chosen.output / name), load_file(again.output / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_align_alone_needs_no_adapter_for_another_number_of_patches(place, teacher, tmp_path):
    chosen = options(
        place, teacher, tmp_path, "narrower, more patches", switch_adapter=None, switch=False, steps=2, log_every=1
    )
    done = train(chosen)
    assert done.losses["loss_align"] > 0 and done.losses["loss_vsd"] == 0


def test_refusals(place, teacher, tmp_path):
    chosen = options(place, teacher, tmp_path, "narrower")
    with pytest.raises(ConfigError, match="belongs to the switch pathway"):
        train(replace(chosen, switch=False))
    with pytest.raises(CheckpointError, match="--switch-adapter linear, or --no-switch"):
        train(replace(chosen, switch_adapter=None))
    clip = tiny.checkpoint(tmp_path / "clip", 1, width=16, vision=tiny.vision_config("clip", width=16), strategy="full")
    check_compatible(open_checkpoint(teacher), open_checkpoint(clip), switch=True, adapter=True)
    with pytest.raises(CheckpointError, match="5 features lie on no square grid"):
        train(replace(chosen, student=clip))
