"""Runs with a baseline's objective, both models' outputs by hand, and the comparison of a term with its loop."""

import json
from dataclasses import replace

import pytest
import torch

from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.positions import predicting_rows


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(found, expected, *inputs):
    """Equal values, and equal gradients with respect to the inputs."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (found, expected)]
    for mine, naive in zip(*grads, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-9, atol=1e-11)


@pytest.fixture
def live(options):
    """Options of a run with a baseline's objective; the data file has a text-only row and one of two turns."""

    def of(name, **more):
        return replace(options, objective=name, switch=False, teacher_mode="live", cache=None, template="qa", **more)

    return of


def history(run):
    entries = json.loads((run / "summary.json").read_text())["history"]
    return [entry for entry in entries if "loss_ce" in entry]


def whole_file(options, cached):
    """The student's checkpoint, and the data file as one batch."""
    opened = open_checkpoint(options.student)
    encoder = SampleEncoder(opened, TEMPLATES["qa"], cached / "images", 128)
    return opened, collate([encoder.encode(sample) for sample in SampleFile(cached / "data.json")], 0)


def by_hand(options, cached):
    """Both models' plain eager forward over the whole data file."""
    opened, batch = whole_file(options, cached)
    rows, has_image = predicting_rows(batch.pop("labels")), batch.pop("has_image")
    is_image = batch["input_ids"] == opened.image_token_id
    out = []
    for path in (options.student, options.teacher):
        model = load_model(open_checkpoint(path))
        model.set_attn_implementation("eager")
        with torch.no_grad():
            done = model(**batch, output_attentions=True)
        out.append((done.logits, done.image_hidden_states, done.attentions[0], done.attentions))
    return out, rows, has_image, is_image, batch["attention_mask"].bool()
