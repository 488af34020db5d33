"""What judging a student on held-out samples costs a run, at the defaults: the same run with and without, side by side.

    python benchmarks/held_out.py --workdir build/bench-held-out

The demo's teacher, student and data (easy-VQA); the held-out samples are 256 of the test split, with a store of their own, so that
CE, Align, VSD and exact match of 64 answers are computed. By default a student is judged each time it has trained on 100 times as
many samples, here after 800 steps of 32 samples. Times are CPU seconds of whole runs of 800 steps, each in a process of its own.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from side_by_side import measure

from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.demo import easy_vqa
from switchkd.pipelines.run_folder import SUMMARY
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

SAMPLES, STEPS, BATCH = 12_800, 800, 32


def prepare(work: Path) -> TrainOptions:
    """Write data, checkpoints and stores below `work`; return the options of the run that is judged."""
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


def seconds_of(options: TrainOptions) -> float:
    """Return the CPU seconds of a run from its beginning."""
    shutil.rmtree(options.output, ignore_errors=True)
    return measure(lambda: train(options))


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("build/bench-held-out"))
    judged = prepare(parser.parse_args().workdir)
    plain = replace(judged, output=judged.output.with_name("plain"), eval_data=None, eval_cache=None)
    without, with_held_out = seconds_of(plain), seconds_of(judged)
    history = json.loads((judged.output / SUMMARY).read_text())["history"]
    found = [entry for entry in history if "eval_seconds" in entry]
    steps = sum(entry["seconds"] for entry in history if "loss_ce" in entry)
    looked = sum(entry["eval_seconds"] for entry in found)
    at = " and ".join(f"{entry['step']:,}" for entry in found)
    print(f"| run of {STEPS:,} steps | CPU seconds |\n| --- | ---: |")
    print(f"| not judged | {without:.1f} |\n| judged after {at} | {with_held_out:.1f} |")
    clock = f"{looked:.2f} s of {looked + steps:.1f} s, {looked / (looked + steps):.2%}"
    print(f"\nratio {with_held_out / without:.3f}; the judged run's own clock: {clock}")


if __name__ == "__main__":
    main()
