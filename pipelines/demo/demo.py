"""`switchkd demo`: the complete method on easy-VQA, on a laptop, from public data to a table.

A teacher is cached once; three students with the same initial weights, data order and number of steps are trained: by SFT, by Align
alone and by Switch-KD from that store; all are evaluated on the whole test split. Every step resumes after an interruption.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.counting import counted
from switchkd.errors import ConfigError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.demo import easy_vqa
from switchkd.pipelines.demo.easy_vqa import (
    STUDENT_LANGUAGE,
    STUDENT_VISION,
    TEACHER_LANGUAGE,
    TEACHER_VISION,
    TEACHER_WEIGHTS,
)
from switchkd.pipelines.demo.options import DemoOptions
from switchkd.pipelines.drawing import PAGES, TEACHER, color, matplotlib_ready, show_differences, style, whole_numbers
from switchkd.pipelines.evaluation.exact_match import Scores, evaluate
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.run_folder import SUMMARY, write_atomically
from switchkd.pipelines.stopwatch import Stopwatch
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.stores.info import StoreInfo, describe


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo."""

    report: Path
    picture: Path
    table: str  # Markdown
    seconds: float


def demo(options: DemoOptions) -> DemoResult:
    """Run or finish the demo in `workdir`.

    Raises:
        ConfigError: easy-vqa or matplotlib is not installed, or `workdir` holds a demo with other options.
    """
    _require_packages()
    work = options.workdir
    watch = Stopwatch(work / "seconds.json")
    with watch.timing("data"):
        easy_vqa.write_data(work / "data")
        _choose_samples(work / "data", options)
    with watch.timing("teacher"):
        teacher = _teacher(options)
    with watch.timing("cache"):
        cache_teacher(_cache_options(work, teacher))
    student = work / "student"
    if not student.exists():
        easy_vqa.write_checkpoint(student, vision=STUDENT_VISION, language=STUDENT_LANGUAGE, seed=options.seed)
    runs = {name: work / "runs" / name for name in STUDENTS}
    for name, run in runs.items():
        with watch.timing(f"train {name}"):
            train(_student_options(options, name, run, teacher, student))
    scores = {}
    for name, model in {"teacher": teacher, **runs}.items():
        with watch.timing(f"eval {name}"):
            scores[name] = evaluate(_eval_options(work, name, model))
    return _report(options, runs, scores, describe(work / "stores"), watch.seconds)


def _require_packages() -> None:
    easy_vqa.package_folder()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("the demo draws with matplotlib: pip install 'switchkd[demo]'") from None


def _choose_samples(data: Path, options: DemoOptions) -> None:
    """Write the students' data file: every n-th training row, plain and mirrored alike."""
    rows = json.loads((data / "train.json").read_text())
    write_atomically(data / "distil.json", json.dumps(easy_vqa.spread(rows, options.student_samples)))


def _teacher(options: DemoOptions) -> Path:
    """Return the teacher's checkpoint: created from the shipped weights, or trained here by PT on captions, then SFT."""
    work = options.workdir
    if not options.train_teacher:
        folder = work / "teacher"
        if not folder.exists():
            unfinished = work / ".teacher"
            easy_vqa.write_checkpoint(
                unfinished, vision=TEACHER_VISION, language=TEACHER_LANGUAGE, seed=0, weights=TEACHER_WEIGHTS
            )
            unfinished.rename(folder)
        return folder
    blank = work / "teacher-blank"
    if not blank.exists():
        easy_vqa.write_checkpoint(blank, vision=TEACHER_VISION, language=TEACHER_LANGUAGE, seed=options.seed)
    pt, sft = work / "runs/teacher-pt", work / "runs/teacher-sft"
    train(_sft_options(work, blank, "captions", pt, steps=2000, batch_size=64, lr=1e-3, seed=options.seed))
    train(_sft_options(work, pt, "train", sft, steps=4000, batch_size=32, lr=1e-3, seed=options.seed))
    return sft


def _sft_options(work: Path, start: Path, data: str, run: Path, **settings: Any) -> TrainOptions:
    return TrainOptions(
        student=start,
        data=work / f"data/{data}.json",
        images=work / "data/images",
        output=run,
        objective="sft",
        switch=False,
        template=easy_vqa.TEMPLATE,
        warmup=0.05,
        weight_decay=0.05,
        log_every=100,
        **settings,
    )


def _cache_options(work: Path, teacher: Path) -> CacheOptions:
    return CacheOptions(
        teacher=teacher,
        data=work / "data/distil.json",
        images=work / "data/images",
        out=work / "stores/easy-vqa.zarr",
        template=easy_vqa.TEMPLATE,
        part_size=1600,
        batch_size=64,
    )


def _student_options(options: DemoOptions, name: str, run: Path, teacher: Path, student: Path) -> TrainOptions:
    work = options.workdir
    distilled = name != "sft"
    return TrainOptions(
        student=student,
        data=work / "data/distil.json",
        images=work / "data/images",
        output=run,
        teacher=teacher if distilled else None,
        cache=work / "stores" if distilled else None,
        objective="dbild-rkl" if distilled else "sft",
        switch=name == "switch-kd",
        template=easy_vqa.TEMPLATE,
        steps=options.student_steps,
        batch_size=32,
        lr=1e-3,
        warmup=0.05,
        weight_decay=0.05,
        log_every=50,
        save_every=250,
        seed=options.seed,
    )


def _eval_options(work: Path, name: str, model: Path) -> EvalOptions:
    return EvalOptions(
        model=model,
        data=work / "data/test.json",
        images=work / "data/images",
        output=work / "eval" / name,
        template=easy_vqa.TEMPLATE,
        max_new_tokens=4,
        batch_size=256,
    )


STUDENTS = ("sft", "align", "switch-kd")
NAMES = {
    "teacher": "teacher",
    "sft": "student, SFT",
    "align": "student, Align",
    "switch-kd": "student, Switch-KD",
}


# Student → its terms beside CE, drawn on an axis of their own.
_PARTS = {"align": {"align": "Align"}, "switch-kd": {"align": "Align", "vsd": "VSD"}}


def _report(
    options: DemoOptions,
    runs: dict[str, Path],
    scores: dict[str, Scores],
    store: StoreInfo,
    seconds: dict[str, float],
) -> DemoResult:
    work = options.workdir
    table = _table(scores, seconds)
    gains = {other: scores["switch-kd"].accuracy - scores[other].accuracy for other in ("sft", "align")}
    picture = work / "report.png"
    _draw(picture, runs, scores)
    total = sum(seconds.values())
    text = f"""# switchkd demo: easy-VQA

{table}

Switch-KD, with the same first weights, data order and {counted(options.student_steps, "step")} (seed {options.seed}):
{gains["sft"]:+.4f} accuracy against SFT, {gains["align"]:+.4f} against Align alone, which has the teacher's logits but no switch.
Answering from the question alone scores {easy_vqa.BLIND_ACCURACY:.3f}.

What this shows: that both stages run, and how soon a student uses the image at all. What it does not show: that it learns to see (a
mean colour answers the colour questions), or that the teacher's logits are what helps (the trained decoder alone does about as
well). One seed says little: repeat with `--seed` before believing a small difference. The time column shows what
Switch-KD costs more than SFT; equal steps are not equal time. docs/evidence.md has more seeds, tuned rates and the control.

The store: {store.samples:,} samples, {store.positions:,} positions, {store.store_bytes / 1e6:.1f} MB on disk,
{store.bytes_per_position:.0f} bytes a position, all {store.manifest.top_k} logits of the demo's vocabulary.
Everything together took {total:,.0f} s.

![losses and accuracies](report.png)

With real checkpoints the same two stages are:

    switchkd cache-teacher --teacher TEACHER --data llava_v1_5_mix665k.json --images images/ --out stores/mix665k.zarr
    switchkd train --teacher TEACHER --student STUDENT --data llava_v1_5_mix665k.json --images images/ \\
        --cache stores/ --output runs/switch-kd --precision bfloat16
"""
    write_atomically(work / "report.md", text)
    return DemoResult(work / "report.md", picture, table, total)


def _table(scores: dict[str, Scores], seconds: dict[str, float]) -> str:
    kinds = sorted({kind for score in scores.values() for kind in score.by_type})
    lines = [
        "| model | accuracy | " + " | ".join(kinds) + " | questions | training time |",
        "| --- | " + "---: | " * (len(kinds) + 3),
    ]
    for name, score in scores.items():
        cells = [f"{score.accuracy:.4f}", *(f"{score.by_type[kind]:.4f}" for kind in kinds), f"{score.questions:,}"]
        spent = seconds.get(f"train {name}")
        cells.append("" if spent is None else f"{spent:,.0f} s")
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(path: Path, runs: dict[str, Path], scores: dict[str, Scores]) -> None:
    """Draw the runs' CE, the distances to the teacher on an axis of their own, and the accuracies as bars, which begin at 0."""
    with matplotlib_ready("the demo") as pyplot:
        figure, (losses, distances, bars) = pyplot.subplots(1, 3, figsize=(14, 4.2))
        colors = {"teacher": color(TEACHER)} | {name: color(number) for number, name in enumerate(STUDENTS)}
        drawn: dict[str, list[float]] = {"ce": [], "distances": []}
        number = len(STUDENTS)
        for name, run in runs.items():
            history = [entry for entry in json.loads((run / SUMMARY).read_text())["history"] if "loss_ce" in entry]
            steps = [entry["step"] for entry in history]
            drawn["ce"] += [entry["loss_ce"] for entry in history]
            losses.plot(steps, [entry["loss_ce"] for entry in history], color=colors[name], label=NAMES[name])
            for part, word in _PARTS.get(name, {}).items():
                values = [entry[f"loss_{part}"] for entry in history]
                drawn["distances"] += values
                look = {"linestyle": style(number), "color": color(number)}
                distances.plot(steps, values, **look, label=f"{NAMES[name]}: {word}")
                number += 1
        for axes, title, values in (
            (losses, "CE", drawn["ce"]),
            (distances, "Distance to the teacher", drawn["distances"]),
        ):
            axes.set(xlabel="step", ylabel="nats per position", title=title)
            whole_numbers(axes.xaxis)
            show_differences(axes, values)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        names = list(scores)
        shares = [scores[name].accuracy for name in names]
        labels = [NAMES[name].replace(", ", ",\n") for name in names]
        bars.bar_label(
            bars.bar(labels, shares, color=[colors[name] for name in names]), [f"{share:.3f}" for share in shares]
        )
        bars.axhline(easy_vqa.BLIND_ACCURACY, color="black", linewidth=0.8, linestyle="--", label="question alone")
        title = f"Accuracy on {scores['teacher'].questions:,} test questions"
        bars.set(ylim=(0, 1.1), ylabel="exact match", title=title)
        bars.grid(axis="x", visible=False)
        bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))
        figure.savefig(path, dpi=150, facecolor=PAGES[0])
        pyplot.close(figure)
