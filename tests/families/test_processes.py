"""Two processes in families whose projector reads several cuts, tiles or patches: replicated and sharded, as one process."""

import families
import pytest
import tiny
from training import assert_equal_runs, two_processes

from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("profile", ["ddp", "fsdp"])
def test_two_processes_are_one(family, profile, tmp_path):
    """A text-only row is in one process's batch alone."""
    teacher = families.write_checkpoint(family, tmp_path / "teacher", 1)
    student = families.write_checkpoint(family, tmp_path / "student", 2)
    data = tiny.data(tmp_path / "data", tiny.rows(8, text_only=(3, 4), two_turns=(5,)))
    common = {"data": data, "images": tmp_path / "data" / "images"}
    cache_teacher(CacheOptions(teacher=teacher, out=tmp_path / "s.zarr", payload="hidden", template="qa", **common))
    options = TrainOptions(
        student=student,
        teacher=teacher,
        cache=tmp_path / "s.zarr",
        output=tmp_path / "run",
        steps=3,
        batch_size=2,
        lr=5e-3,
        log_every=1,
        save_every=500,
        **common,
    )
    train(options)
    done = two_processes(options, tmp_path, batch_size=1, steps=3, profile=profile)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(options.output, tmp_path / "two")
