"""Small real runs for tests of reports: stores, trained students, evaluations, scores on the ten benchmarks."""

import json
from dataclasses import asdict

import mixtures
import tiny
import yaml

from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.benchmarks.registry import TEN
from switchkd.pipelines.evaluation.benchmarks.results import Result, write_result
from switchkd.pipelines.evaluation.exact_match import evaluate
from switchkd.pipelines.evaluation.intervals import Unit
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \"it\" & {{ 7 * 7 }} ?"


def make(folder, teacher, student):
    """Write data, stores/t.zarr, runs/{sft,switch-kd} and eval/{teacher,sft,switch-kd} below `folder`."""
    rows = tiny.rows(8, text_only=(1,), two_turns=(2,))
    rows[0]["conversations"][0]["value"] = f"<image>\n{ATTACK}"
    rows[0]["conversations"][1]["value"] = ATTACK
    data = tiny.data(folder / "data", rows)
    here = {"data": data, "images": folder / "data/images"}
    cache_teacher(CacheOptions(teacher=teacher, out=folder / "stores/t.zarr", template="qa", part_size=3, k=4, **here))
    options = {"student": student, "steps": 4, "batch_size": 4, "log_every": 1, "lr": 1e-2, **here}
    runs = {"sft": folder / "runs/sft", "switch-kd": folder / "runs/switch-kd"}
    train(TrainOptions(output=runs["sft"], objective="sft", switch=False, template="qa", **options))
    train(TrainOptions(output=runs["switch-kd"], teacher=teacher, cache=folder / "stores", **options))
    for name, model in {"teacher": teacher, **runs}.items():
        evaluate(EvalOptions(model=model, output=folder / "eval" / name, template="qa", max_new_tokens=3, **here))
    return folder


def make_later_runs(folder, teacher, student, made):
    """Write runs/{lora, mixture, live} and mix/stores below `folder`; `made` is the folder of `make`.

    They have held-out samples, the best student kept, LoRA, a mixture, and other terms of the loss.
    """
    here = {"data": made / "data/data.json", "images": made / "data/images"}
    settings = {"student": student, "steps": 4, "batch_size": 4, "log_every": 1, "lr": 1e-2}
    held_out = {"eval_data": here["data"], "eval_cache": made / "stores", "eval_every": 2, "keep_best": "loss"}
    lora = {"teacher": teacher, "cache": made / "stores", "lora": 4, **held_out}
    train(TrainOptions(output=folder / "runs/lora", **lora, **here, **settings))
    live = {"teacher": teacher, "objective": "llava-kd", "switch": False, "teacher_mode": "live", "template": "qa"}
    train(TrainOptions(output=folder / "runs/live", **live, **here, **settings))
    mixture = mixtures.cut(folder / "mix")
    mixtures.cache(teacher, folder / "mix")
    mixed = {"teacher": teacher, "cache": folder / "mix/stores", "data": mixture, "images": folder / "mix/images"}
    train(TrainOptions(output=folder / "runs/mixture", **mixed, **settings))
    return folder


def benchmarks(folder, scores, fingerprint="f"):
    """Write an evaluation on the ten benchmarks with these scores, in their order; None is a benchmark without a score."""
    results = []
    for benchmark, score in zip(TEN, scores, strict=True):
        split = next(iter(benchmark.splits))
        interval = None if score is None else (score - 1, score + 1)
        about = (benchmark.name, split, benchmark.title, benchmark.metric, score, interval, benchmark.interval)
        results.append(asdict(Result(*about, 100, 100, 0, {}, {}, "", None, fingerprint)))
        (folder / f"{benchmark.name}-{split}").mkdir(parents=True)
        if (
            benchmark.name == "gqa" and score is not None
        ):  # the units of one benchmark, so that runs can be compared on it
            units = [Unit(str(i), (float(i < score),)) for i in range(100)]
            write_result(folder / f"{benchmark.name}-{split}", Result(**results[-1]), units)
        line = {"id": "q1", "question": f"What of {benchmark.name}?", "image": "nowhere.jpg", "reference": "yes"}
        answer = {"prediction": f"answer of {folder.name}"}
        (folder / f"{benchmark.name}-{split}" / "predictions.jsonl").write_text(json.dumps(line | answer) + "\n")
    averages = {name: {"score": None if None in scores else 50.0, "missing": []} for name in ("avg7", "avg10")}
    board = {"schema": 1, "model": str(folder), "weights": "w", "template": "qa", "benchmarks": results}
    (folder / "scores.json").write_text(json.dumps(board | {"averages": averages, "baseline": None}))
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": str(folder)}))
    return folder
