"""vLLM's environment, with its older transformers, beside the trainer's: the same inputs, one store. Run by `make test-vllm`."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import vllm_families

from switchkd.stores import TeacherStore
from switchkd.stores.verify import missing_parts, verify

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

TRAINER = os.environ.get("SWITCHKD_TRAINER", sys.executable)  # a Python of the trainer's environment
NEEDS_TORCHVISION = ("mistral3",)  # which the trainer's environment lacks
ENGINE = ("--backend", "vllm", "--vllm-option", "enforce_eager=true", "--vllm-option", "max_num_batched_tokens=64")
# Encodes every sample of a data file with each teacher, in the environment that runs it.
ENCODE = """
import sys, torch, transformers
from pathlib import Path
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker
data, out, *teachers = map(Path, sys.argv[1:])
found = {"transformers": transformers.__version__}
for teacher in teachers:
    worker = CaptureWorker(CacheOptions(
        teacher=teacher, data=data, out=out.with_suffix(".zarr"), images=data.parent / "images", template="chat",
        dtype="float32", max_length=256,
    ))
    samples = [worker.encoder.encode(sample) for sample in worker.samples]
    found[teacher.name] = [worker.manifest.identity, *(
        [torch.from_numpy(s.input_ids), torch.from_numpy(s.supervised), [*s.digest], dict(s.media or {})] for s in samples
    )]
torch.save(found, out)
"""


def environment(python):
    """The shim on PYTHONPATH is for vLLM's environment alone."""
    kept = {name: value for name, value in os.environ.items() if python == sys.executable or name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def run(python, code, *words, **variables):
    done = subprocess.run(
        [python, "-c", code, *map(str, words)], capture_output=True, text=True, env=environment(python) | variables
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return vllm_families.write_data(tmp_path_factory.mktemp("data"))


def test_both_environments_read_samples_alike(data, tmp_path):
    """Ids, masks, digests, every column of the images bit by bit, and what a store is identified by."""
    families = [family for family in vllm_families.FAMILIES if family not in NEEDS_TORCHVISION]
    teachers = [vllm_families.write_teacher(family, tmp_path / family) for family in families]
    sides = []
    for python in (sys.executable, TRAINER):
        out = tmp_path / f"{len(sides)}.pt"
        run(python, ENCODE, data, out, *teachers)
        sides.append(torch.load(out, weights_only=False))
    ours, trainers = sides
    for teacher in teachers:
        (identity, *samples), (their_identity, *others) = ours[teacher.name], trainers[teacher.name]
        assert identity == their_identity, teacher.name
        for (ids, mask, digest, media), (other_ids, other_mask, other_digest, other_media) in zip(
            samples, others, strict=True
        ):
            assert torch.equal(ids, other_ids) and torch.equal(mask, other_mask) and digest == other_digest
            assert media.keys() == other_media.keys()
            for name, value in media.items():
                assert torch.equal(value, other_media[name]), (teacher.name, name)
    if sys.executable != TRAINER:
        assert ours["transformers"] != trainers["transformers"], "two environments, one transformers: nothing compared"


def cache(python, teacher, data, out, *more, **variables):
    words = (
        "--teacher",
        teacher,
        "--data",
        data,
        "--images",
        data.parent / "images",
        "--out",
        out,
        "--template",
        "chat",
    )
    sizes = ("--payload", "both", "--k", 16, "--max-length", 256, "--part-size", 4, "--dtype", "float32")
    exact = ("--fine", 1 / 4096, "--coarse", 1 / 4096, "--hidden-dtype", "float16")
    code = "from switchkd.cli.main import main; main()"
    return run(python, code, "cache-teacher", *words, *sizes, *exact, *more, **variables)


def assert_stores_agree(one, other):
    found, expected = TeacherStore(one), TeacherStore(other)
    assert found.manifest.identity == expected.manifest.identity
    assert not missing_parts(found) and not any(findings for _, findings in verify(found))
    for index in range(found.manifest.samples):
        assert found[index].digest == expected[index].digest
        ours, theirs = found[index].payload, expected[index].payload
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-4 + 2 / 4096, rtol=0)
        np.testing.assert_allclose(ours.hidden, theirs.hidden, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "smolvlm"])
def test_one_backend_finishes_what_the_other_began(family, data, tmp_path):
    """Whole commands: the engine in a process of its own, transformers in the trainer's environment."""
    teacher = vllm_families.write_teacher(family, tmp_path / "teacher")
    mixed, plain = tmp_path / "mixed.zarr", tmp_path / "plain.zarr"
    cache(TRAINER, teacher, data, plain)
    cache(TRAINER, teacher, data, mixed, "--shard", "2/3")
    assert "3 parts written, 1 there before" in cache(sys.executable, teacher, data, mixed, *ENGINE).stdout
    assert_stores_agree(mixed, plain)


def test_a_mixture_of_experts_is_shared_by_two_processes(data, tmp_path):
    """Tensor parallel; expert parallel does not run on a CPU."""
    teacher = vllm_families.write_teacher("qwen3_vl_moe", tmp_path / "teacher")
    spread, plain = tmp_path / "spread.zarr", tmp_path / "plain.zarr"
    cache(TRAINER, teacher, data, plain)
    said = cache(
        sys.executable, teacher, data, spread, *ENGINE, "--tensor-parallel", "2", VLLM_CPU_OMP_THREADS_BIND="0|1"
    )
    assert "vLLM's final states are transformers'" in said.stderr + said.stdout
    assert_stores_agree(spread, plain)
