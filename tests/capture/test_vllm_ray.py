"""Capture over Ray with an engine of vLLM in every actor. Run by `make test-vllm-ray`."""

import pytest
import tiny

from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.stores import TeacherStore
from switchkd.stores.status import status
from switchkd.stores.verify import verify

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
ray = pytest.importorskip("ray", reason="Ray is not installed: make test-vllm-ray")
pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm-ray")

# Logits of the two backends differ by some 1e-5 (docs/vllm-table.md); a store rounds one to steps of at most 0.125.
ROUNDED = 0.13


def test_two_engines_fill_one_store(tmp_path, monkeypatch):
    """Each part is written by one of them, and every sample has the logits that transformers gives, as a store keeps them."""
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    words = tiny.WORDS + [f"w{i}" for i in range(285)]
    vision = tiny.vision_config(size=32, patch=4, layers=3)
    teacher = tiny.checkpoint(tmp_path / "teacher", 0, width=64, words=words, vision=vision, layer=-2)
    data = tiny.data(tmp_path / "data", tiny.rows(24, text_only=(3, 9), two_turns=(5,)))
    (data.parent / "images/007.png").unlink()
    given = {
        "teacher": teacher,
        "data": data,
        "images": data.parent / "images",
        "template": "qa",
        "payload": "topk",
        "k": 32,
        "max_length": 256,
        "part_size": 2,
        "dtype": "float32",
    }
    alone = tmp_path / "alone.zarr"
    cache_teacher(CacheOptions(**given, out=alone, device="cpu"))
    out = tmp_path / "s.zarr"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        done = cache_teacher(CacheOptions(**given, out=out, backend="vllm", engine="ray", actors=2))
    finally:
        ray.shutdown()
    assert (done.parts_written, done.parts_missing, done.skipped) == (12, 0, {"image_missing": 1})
    assert len(status(out).writers) == 2, "one actor did everything: the test tests nothing"
    store, other = TeacherStore(out), TeacherStore(alone)
    store.check_complete()
    assert not any(findings for _, findings in verify(store))
    for mine, theirs in zip(store, other, strict=True):
        assert (mine.status, mine.index) == (theirs.status, theirs.index)
        if not mine.status:
            assert mine.ids[:, 0].tolist() == theirs.ids[:, 0].tolist()
            assert abs(mine.logits[:, 0] - theirs.logits[:, 0]).max() < ROUNDED
