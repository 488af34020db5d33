"""`--check`: vLLM's final states compared with those of transformers, here with a stand-in for vLLM; see test_vllm.py."""

import logging
import os
import re

import numpy as np
import pytest
import tiny

from switchkd.errors import CheckpointError, ConfigError
from switchkd.pipelines.capture import worker as workers
from switchkd.pipelines.capture.backends import vllm_parity
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.backends.vllm_plugin import CAUSE, CauseWriter
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker
from switchkd.stores import TeacherStore


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    rows = tiny.rows(6, text_only=(3,))
    data = tiny.data(folder, rows)
    (folder / "images" / rows[0]["image"]).unlink()
    return {
        "teacher": tiny.checkpoint(folder / "teacher", 0),
        "data": data,
        "images": folder / "images",
        "template": "qa",
        "part_size": 3,
    }


@pytest.fixture
def vllm_is_transformers(monkeypatch):
    """Captures "with vLLM" run the transformers backend; the other side runs in a process of its own, as with vLLM."""
    monkeypatch.setattr("switchkd.pipelines.capture.cache_teacher.check_available", lambda *_: None)

    def start(name, checkpoint, dtype, *, before_engine, **_):
        before_engine()
        return TransformersBackend(checkpoint, "cpu", dtype)

    monkeypatch.setattr(workers, "open_backend", start)
    monkeypatch.setattr("switchkd.pipelines.capture.manifest.software_of", lambda backend: {"backend": backend})


@pytest.mark.parametrize("payload", ["topk", "hidden"])
def test_the_first_samples_are_compared_before_anything_is_written(
    given, tmp_path, vllm_is_transformers, caplog, payload
):
    options = CacheOptions(**given, out=tmp_path / "s.zarr", backend="vllm", payload=payload, check=2, k=8)
    with caplog.at_level(logging.INFO, logger="switchkd"):
        cache_teacher(options)
    told = caplog.text
    assert "comparing vLLM with transformers on 2 samples" in told
    assert float(re.search(r"transformers' to (\S+) of their size", told)[1]) < 1e-5
    assert (TeacherStore(options.out).statuses() == 0).sum() == 5


def test_another_teacher_is_refused_and_nothing_is_written(given, tmp_path, vllm_is_transformers, monkeypatch):
    def turned(backend, samples, manifest):
        return [states[:, ::-1] for states in vllm_parity.hidden_states(backend, samples, manifest)]

    monkeypatch.setattr(workers, "hidden_states", turned)
    options = CacheOptions(**given, out=tmp_path / "s.zarr", backend="vllm", payload="topk")
    with pytest.raises(CheckpointError, match=r"states differ from transformers' by 1\.\d+ of their size .*--check 0"):
        cache_teacher(options)
    assert not options.out.exists()


def test_by_default_the_first_worker_of_a_new_store_checks_one_sample(given, tmp_path):
    def checked(**more):
        worker = CaptureWorker(CacheOptions(**given | {"out": tmp_path / "s.zarr", "payload": "topk"} | more))
        return len(worker._samples_to_check())

    assert checked() == 0  # transformers is what it would be compared with
    vllm = {"backend": "vllm"}
    software = {"backend": "vllm"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchkd.pipelines.capture.manifest.software_of", lambda backend: software)
        assert checked(**vllm) == 1
        assert checked(**vllm, shard=(1, 2)) == 0
        assert checked(**vllm, shard=(1, 2), check=3) == 3
        assert checked(**vllm, check=100) == 5  # all that can be used
        assert checked(**vllm, engine="ray") == 0
        cache_teacher(CacheOptions(**given, out=tmp_path / "s.zarr", payload="topk", shard=(0, 2)))
        assert checked(**vllm) == 0


def test_it_is_told_where_it_is_left_out(given, tmp_path, vllm_is_transformers, monkeypatch, caplog):
    monkeypatch.setattr(vllm_parity, "ROOM", 1e12)  # of no use in the other process, so called here
    worker = CaptureWorker(CacheOptions(**given, out=tmp_path / "s.zarr", backend="vllm", payload="hidden"))
    with pytest.raises(
        vllm_parity.LeftOut, match=r"takes \d+\.\d GB with transformers, and \d+\.\d GB are free on cpu"
    ):
        vllm_parity._teacher(worker.checkpoint, "float32")
    worker.checkpoint.config.quantization_config = {"quant_method": "fp8"}
    monkeypatch.setattr(workers, "open_backend", lambda *_, before_engine, **__: before_engine() or "the engine")
    assert worker.backend == "the engine"
    assert "states are not compared with transformers': its weights are quantised" in caplog.text


def test_an_error_of_the_other_process_is_its_own(given, tmp_path):
    folder = tiny.checkpoint(tmp_path / "teacher", 0)
    worker = CaptureWorker(CacheOptions(**given | {"teacher": folder}, out=tmp_path / "s.zarr", payload="hidden"))
    (folder / "model.safetensors").write_bytes(b"damaged")
    samples = [worker.encoder.encode(worker.samples[1])]
    with pytest.raises(CheckpointError, match=str(folder)):
        vllm_parity.states_with_transformers(worker.checkpoint, "float32", samples, worker.manifest)


def test_one_position_may_differ(given, tmp_path):
    """As where an expert is chosen otherwise at a tie; the median is compared, with the tolerance of the dtype."""
    checkpoint = CaptureWorker(CacheOptions(**given, out=tmp_path / "s.zarr", payload="hidden")).checkpoint
    states = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    moved = states.copy()
    moved[0, 0] = -moved[0, 0]
    assert vllm_parity.check_parity(checkpoint, "float32", list(moved), list(states)) == 0
    for dtype, tolerance in vllm_parity.TOLERANCES.items():
        assert (
            vllm_parity.check_parity(checkpoint, dtype, list(states * (1 + 0.9 * tolerance)), list(states)) < tolerance
        )
        with pytest.raises(CheckpointError, match=dtype):
            vllm_parity.check_parity(checkpoint, dtype, list(states * (1 + 1.1 * tolerance)), list(states))
        with pytest.raises(CheckpointError, match="nan"):
            vllm_parity.check_parity(checkpoint, dtype, list(states * np.nan), list(states))


def test_it_is_vllms_option(given, tmp_path):
    with pytest.raises(ConfigError, match="--check are vLLM's: add --backend vllm"):
        CacheOptions(**given, out=tmp_path / "s.zarr", check=1)


def test_a_forked_engine_writes_its_cause_where_the_parent_reads_it(tmp_path, monkeypatch):
    """Its handlers were made when the plugin was loaded, before the file was named; a process that is spawned makes its own."""
    logger = logging.getLogger("an engine")
    logger.propagate = False
    logger.addHandler(CauseWriter())
    monkeypatch.setenv(CAUSE, str(tmp_path / "cause"))
    if (child := os.fork()) == 0:
        try:
            raise ValueError("too little memory")
        except ValueError:
            logger.exception("it failed")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "cause").read_text() == "too little memory"
    monkeypatch.setenv(CAUSE, str(tmp_path / "nowhere/cause"))
    logger.error("it failed", exc_info=ValueError("again"))
    monkeypatch.delenv(CAUSE)
    logger.error("it failed", exc_info=ValueError("again"))
    assert [path.name for path in tmp_path.iterdir()] == ["cause"]
