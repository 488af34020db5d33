"""Checkpoints and pairs of families that cannot be used: one line, exit code 2, before anything is written."""

import importlib.util
import json
import shutil

import families as tiny
import pytest
import tiny as llavas
from click.testing import CliRunner

from switchkd.cli.main import main

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3", "qwen3_5", "mistral3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for family in FAMILIES:
        tiny.write_checkpoint(family, folder / family, 1)
    llavas.data(folder / "data", llavas.rows(2))
    return folder


def refused(saved, *words):
    """The message of a command that must fail with exit code 2."""
    given = ("--data", saved / "data/data.json", "--images", saved / "data/images", "--template", "qa")
    done = CliRunner().invoke(main, [str(word) for word in (*words, *given)])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit) and "Traceback" not in done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.stderr.rstrip().endswith(line)
    return line


def captured(saved, teacher, tmp_path):
    line = refused(saved, "cache-teacher", "--teacher", teacher, "--out", tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists() and str(teacher) in line
    return line


def trained(saved, teacher, student, tmp_path, *more):
    run = tmp_path / "run"
    words = ("train", "--teacher", saved / teacher, "--student", saved / student, "--teacher-mode", "live")
    line = refused(saved, *words, "--output", run, "--steps", 1, *more)
    assert not (run / "run.yaml").exists()
    return line


def changed(saved, family, tmp_path, *without, **processor):
    """A copy of a checkpoint without some of its files, with other fields of processor_config.json."""
    folder = shutil.copytree(saved / family, tmp_path / "model")
    for name in without:
        (folder / name).unlink()
    if processor:
        path = folder / "processor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | processor))
    return folder


def test_a_processor_of_an_unknown_class(saved, tmp_path):
    line = captured(saved, changed(saved, "qwen2_5_vl", tmp_path, processor_class="AnyProcessor"), tmp_path)
    for words in ("names the processor 'AnyProcessor'", "expected Qwen2_5_VLProcessor", "copy processor_config.json"):
        assert words in line


@pytest.mark.parametrize(
    ("family", "said"),
    [("internvl", "its processor writes 1,280 tokens, and its model has 20 features"),
     ("llava_onevision", "fails on a made-up image")],
)  # fmt: skip
def test_a_missing_processor(family, said, saved, tmp_path):
    """Its class is known by the model's type, but not the number of tokens of an image."""
    folder = changed(saved, family, tmp_path, "processor_config.json")
    line = captured(saved, folder, tmp_path)
    assert said in line and "copy processor_config.json" in line
    asked = ("chat", "--model", folder, "--image", saved / "data/images/000.png", "--question", "?", "--template", "qa")
    done = CliRunner().invoke(main, [str(word) for word in asked])
    assert done.exit_code == 2 and said in done.stderr


def test_a_missing_image_processor(saved, tmp_path):
    folder = changed(saved, "internvl", tmp_path, "processor_config.json", "preprocessor_config.json")
    line = captured(saved, folder, tmp_path)
    assert "has no image processor: preprocessor_config.json is missing; copy it from the model's origin" in line


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision(saved, tmp_path):
    line = captured(saved, saved / "mistral3", tmp_path)
    assert "its processor (PixtralProcessor) needs the package torchvision: pip install torchvision" in line


@pytest.mark.parametrize(
    ("kind", "said"),
    [("qwen2", "transformers does not know as a model that reads images"), ("mllama", "takes no mm_encoder_outputs"),
     ("aya_vision", "has no entry in switchkd/models/families.py"), ("unheard_of", "does not know: take a checkpoint of")],
)  # fmt: skip
def test_a_checkpoint_of_no_family(kind, said, saved, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    line = captured(saved, folder, tmp_path)
    assert f"is a '{kind}' model" in line and said in line and "Supported: llava, " in line


def test_two_families_with_one_tokenizer(saved, tmp_path):
    for more in ((), ("--switch-adapter", "linear")):
        line = trained(saved, "qwen3_vl", "qwen2_5_vl", tmp_path, *more)
        for words in ("visual.deepstack_merger_list.0", "gives them at visual.merger", "take two models of one family",
                      "--no-switch", str(saved / "qwen3_vl"), str(saved / "qwen2_5_vl")):  # fmt: skip
            assert words in line


def test_two_families_with_two_tokenizers(saved, tmp_path):
    line = trained(saved, "qwen3_vl", "internvl", tmp_path)
    assert "the tokenizers differ" in line and "--vocab-map" in line
    line = trained(saved, "qwen3_vl", "internvl", tmp_path, "--vocab-map")
    assert "in other places" in line and "--no-switch" in line


@pytest.mark.parametrize(
    ("family", "said"), [("gemma3", "image tokens that see each other"), ("qwen3_5", "linear_att")]
)
def test_packing_where_samples_would_mix(family, said, saved, tmp_path):
    line = trained(saved, family, family, tmp_path, "--packing", 256)
    assert line.startswith("Error: --packing: ") and said in line and "leave --packing out" in line
    assert str(saved / family) in line
