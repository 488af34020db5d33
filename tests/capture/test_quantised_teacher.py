"""A teacher with quantised weights: vLLM runs it and its store says so; transformers refuses it before anything expensive."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_lm_head, load_model
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.settings import OLDEST_FOR_TRAINING
from switchkd.stores import TeacherStore

W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip
WORDS = tiny.WORDS + [f"w{i}" for i in range(285)]
VISION = tiny.vision_config(size=32, patch=8, layers=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "teacher"
    return tiny.checkpoint(folder, 0, width=64, words=WORDS, vision=VISION, layer=-2, tied=False)


@pytest.fixture(scope="module")
def quantised(whole, tmp_path_factory):
    """The same with int8 weights in its LLM's layers, in the format of compressed-tensors."""
    folder = tmp_path_factory.mktemp("quantised") / "teacher"
    shutil.copytree(whole, folder)
    made = {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        made[name] = tensor
        if "language_model" in name and name.endswith("proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            made[name] = (tensor / scale).round().clamp(-128, 127).to(torch.int8)
            made[f"{name}_scale"] = scale
    assert sum(tensor.dtype == torch.int8 for tensor in made.values()) >= 14
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": W8A8}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data(tmp_path_factory.mktemp("data"), tiny.rows(6, text_only=(3,)))


def given(data, teacher):
    return {"teacher": teacher, "data": data, "images": data.parent / "images", "template": "qa"}


def test_the_checkpoint_says_how(whole, quantised):
    assert open_checkpoint(whole).quantization is None
    assert open_checkpoint(quantised).quantization == "compressed-tensors"


def test_transformers_does_not_run_it(quantised, data, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"has quantised weights \(compressed-tensors\), which only .*--backend vllm.* runs"
    ):
        cache_teacher(CacheOptions(**given(data, quantised), out=tmp_path / "s.zarr"))
    assert not (tmp_path / "s.zarr").exists()
    with pytest.raises(CheckpointError, match="pass the checkpoint that it was made from"):
        load_model(open_checkpoint(quantised))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version(OLDEST_FOR_TRAINING),
    reason="training needs a newer transformers than vLLM's",
)
def test_a_quantised_student_or_live_teacher_is_refused_first(whole, quantised, data, tmp_path):
    plain = given(data, None) | {"output": tmp_path / "run", "objective": "sft", "switch": False}
    with pytest.raises(CheckpointError, match="train the checkpoint that it was made from"):
        train(TrainOptions(**plain | {"student": quantised}))
    live = plain | {"teacher": quantised, "objective": "dbild-rkl", "teacher_mode": "live"}
    for more in ({"switch": True}, {"switch": False}):
        with pytest.raises(CheckpointError, match="pass --no-switch to train from its store alone"):
            train(TrainOptions(**live | more, student=whole))
    assert not (tmp_path / "run").exists()


def test_a_quantised_lm_head_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("lm_head.weight"))
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is torch.float8_e4m3fn, whose scale is stored elsewhere"
    ):
        load_lm_head(open_checkpoint(folder), "float32")


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_runs_it_and_a_student_learns_from_its_store(whole, quantised, data, tmp_path):
    """States are near the whole teacher's and not equal; top-k logits are the LM head times them; the store names the method."""
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")
    words = ("--payload", "both", "--k", "16", "--hidden-dtype", "float16", "--fine", "0.001", "--coarse", "0.001")
    engine = ("--backend", "vllm", "--vllm-option", "enforce_eager=true", "--max-length", "256", "--dtype", "float32")
    for teacher in (whole, quantised):
        done = subprocess.run(
            [
                sys.executable, "-c", "from switchkd.cli.main import main; main()", "cache-teacher",
                *(word for name, value in given(data, teacher).items() for word in (f"--{name}", str(value))),
                "--out", str(tmp_path / f"{teacher.parent.name[:5]}.zarr"), *words, *engine,
            ],
            capture_output=True, text=True, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert "states are not compared with transformers': its weights are quantised" in done.stdout + done.stderr
    exact, store = (TeacherStore(tmp_path / f"{name}.zarr") for name in ("whole", "quant"))
    assert store.manifest.written_by["quantization"] == "compressed-tensors"
    assert "quantization" not in exact.manifest.written_by
    assert store.manifest.teacher["language"] != exact.manifest.teacher["language"]
    found, expected = store.payload(range(6)), exact.payload(range(6))
    change = np.linalg.norm(found.hidden - expected.hidden) / np.linalg.norm(expected.hidden)
    assert 1e-4 < change < 0.1, change
    head = load_lm_head(open_checkpoint(quantised), "float32")[: store.manifest.vocab_rows].numpy()
    logits = np.take_along_axis(found.hidden @ head.T, found.ids.astype(np.int64), 1)
    np.testing.assert_allclose(found.logits, logits, atol=5e-3)
    student = tiny.checkpoint(tmp_path / "student", 3, width=32, words=WORDS, vision=VISION, layer=-2)
    words = ("--student", student, "--cache", store.path, "--output", tmp_path / "run", "--no-switch", "--steps", "2")
    trained = subprocess.run(
        [
            os.environ.get("SWITCHKD_TRAINER", sys.executable), "-c", "from switchkd.cli.main import main; main()", "train",
            *("--teacher", str(quantised), "--data", str(data), "--images", str(data.parent / "images")),
            *map(str, words), "--batch-size", "3",
        ],
        capture_output=True, text=True, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert json.loads((tmp_path / "run/summary.json").read_text())["losses"]["loss_align"] > 0
