"""What evaluating a student on held-out samples costs a run, at the defaults.

    python benchmarks/held_out.py --workdir build/bench-held-out

The demo's teacher, student and data (easy-VQA); the held-out samples are 256 of the test split, with a store of their own, so that
CE, Align, VSD, exact match of 64 answers and the student's visual advantage on 16 images are computed. By default a student is
evaluated when it has trained on 100 times as many samples, here after 800 steps of 32 samples. CPU seconds of the evaluation and of
all else in one run of 800 steps: two runs, with and without, differ by more than that on a machine that does other work, too.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.demo import easy_vqa
from switchkd.pipelines.training.held_out.evaluating_trainer import EvaluatingTrainer
from switchkd.pipelines.training.held_out.student_advantage import StudentAdvantage
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

SAMPLES, STEPS, BATCH = 12_800, 800, 32


def prepare(work: Path) -> TrainOptions:
    """Write data, checkpoints and stores below `work`; return the options of the run that is evaluated."""
    data = work / "data"
    easy_vqa.write_data(data)
    for name, source, count in (("distil", "train", SAMPLES), ("held-out", "test", 256)):
        rows = json.loads((data / f"{source}.json").read_text())
        (data / f"{name}.json").write_text(json.dumps(easy_vqa.spread(rows, count)))
    teacher, student = work / "teacher", work / "student"
    if not teacher.exists():
        sizes = {"vision": easy_vqa.TEACHER_VISION, "language": easy_vqa.TEACHER_LANGUAGE}
        easy_vqa.write_checkpoint(teacher, **sizes, seed=0, weights=easy_vqa.TEACHER_WEIGHTS)
    if not student.exists():
        sizes = {"vision": easy_vqa.STUDENT_VISION, "language": easy_vqa.STUDENT_LANGUAGE}
        easy_vqa.write_checkpoint(student, **sizes, seed=0)
    given = {"teacher": teacher, "images": data / "images", "template": easy_vqa.TEMPLATE}
    for name in ("distil", "held-out"):
        cache_teacher(
            CacheOptions(data=data / f"{name}.json", out=work / f"stores/{name}.zarr", batch_size=64, **given)
        )
    return TrainOptions(
        student=student,
        data=data / "distil.json",
        cache=work / "stores/distil.zarr",
        output=work / "run",
        steps=STEPS,
        batch_size=BATCH,
        lr=1e-3,
        log_every=100,
        save_every=STEPS,
        eval_data=data / "held-out.json",
        eval_cache=work / "stores/held-out.zarr",
        workers=0,
        **given,
    )


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("build/bench-held-out"))
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer measure the evaluation alone")
    given = parser.parse_args()
    options = replace(prepare(given.workdir), steps=given.steps)
    shutil.rmtree(options.output, ignore_errors=True)

    def timed(function: Callable[..., dict[str, float]], seconds: list[float]) -> Callable[..., dict[str, float]]:
        def call(*given: Any, **named: Any) -> dict[str, float]:
            began = process_time()
            found = function(*given, **named)
            seconds.append(process_time() - began)
            return found

        return call

    of_evaluations: list[float] = []
    of_looking: list[float] = []
    EvaluatingTrainer.evaluate = timed(EvaluatingTrainer.evaluate, of_evaluations)  # type: ignore[method-assign]
    StudentAdvantage.measure = timed(StudentAdvantage.measure, of_looking)  # type: ignore[method-assign]
    began = process_time()
    train(options)
    evaluated = sum(of_evaluations)
    steps = process_time() - began - evaluated
    print(f"| run of {options.steps:,} steps of {BATCH} samples | CPU seconds |\n| --- | ---: |")
    print(f"| all else | {steps:.1f} |\n| {len(of_evaluations)} evaluation | {evaluated:.2f} |")
    print(f"| of it, the visual advantage | {sum(of_looking):.2f} |")
    print(f"\noverhead {evaluated / steps:.2%}")


if __name__ == "__main__":
    main()
