"""Run benchmarks: answer every question once, then score; either step can be repeated without the other."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.data.encoded import Prompt
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, Status
from switchkd.data.templates import IMAGE_MARKER
from switchkd.errors import ConfigError, DataError, InputError
from switchkd.fingerprints import hash_json, hash_weights
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.benchmarks.base import Benchmark, Question, fingerprint, units_of
from switchkd.pipelines.evaluation.benchmarks.layouts import Files, find_files
from switchkd.pipelines.evaluation.benchmarks.registry import parse_tasks
from switchkd.pipelines.evaluation.benchmarks.results import Result, folder_name, score, write_result
from switchkd.pipelines.evaluation.benchmarks.scoreboard import write_scoreboard
from switchkd.pipelines.evaluation.generation import GreedyGenerator, encoded_batches, read_lines
from switchkd.pipelines.evaluation.options import BenchmarkOptions
from switchkd.pipelines.evaluation.sampling import sample_of
from switchkd.pipelines.model_template import template_of_model
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.run_folder import PREDICTIONS, RECORD, record, write_atomically
from switchkd.waits import Waiting


@dataclass(frozen=True)
class Task:
    """One benchmark split with its questions."""

    benchmark: Benchmark
    split: str
    questions: list[Question]  # of the sample, if `--limit` leaves some out
    strata: frozenset[str]  # of the whole split
    split_units: int  # in the whole split
    limited_to: int | None  # units in the sample; None: the whole split is asked
    digest: str  # of the whole split
    data: Files
    folder: Path  # its results


def run_benchmarks(options: BenchmarkOptions) -> str:
    """Answer and score benchmarks, and return the Markdown table of all results in the output folder.

    Questions with an answer in the folder are not run again. Questions that could not be used are recorded as failed, counted
    separately, and their units are left out of the score.

    Raises:
        InputError: a file is missing, a task is unknown, or `output` holds answers of another model or to other questions.
    """
    tasks = read_tasks(options)
    if options.score_only:
        for task in tasks:
            _check_record(task)
    else:
        _answer_all(tasks, options)
    for task in tasks:
        with Waiting(f"scoring {task.benchmark.name} ({task.split})"):
            _score(task)
    with Waiting("comparing with the baseline" if options.baseline else "writing the table"):
        return write_scoreboard(options.output, options.baseline)


def read_tasks(options: BenchmarkOptions) -> list[Task]:
    """Read all questions first, so that a missing file of the last benchmark is reported before work on the first begins."""
    parsed = parse_tasks(options.tasks)
    found = [find_files(benchmark, options.benchmarks, split) for benchmark, split in parsed]
    tasks = []
    for (benchmark, split), data in zip(parsed, found, strict=True):
        try:
            with Waiting(f"reading the questions of {benchmark.name} ({split})"):
                questions = benchmark.read(data, split)
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{benchmark.name} ({split}): a file is not in the published format: {error!r}") from error
        if len({question.id for question in questions}) != len(questions) or not questions:
            raise DataError(
                f"{benchmark.name} ({split}): expected questions with ids of their own, found {len(questions)}"
            )
        units = {question.unit_id: question.stratum for question in questions}
        chosen = sample_of(units, options.limit)
        tasks.append(
            Task(
                benchmark,
                split,
                [question for question in questions if question.unit_id in chosen],
                frozenset(units.values()),
                len(units),
                len(chosen) if len(chosen) < len(units) else None,
                fingerprint(questions),
                data,
                options.output / folder_name(benchmark.name, split),
            )
        )
    return tasks


def _answer_all(tasks: Sequence[Task], options: BenchmarkOptions) -> None:
    if options.model is None:
        raise ConfigError("--model is needed to answer questions; only --score-only works without it")
    checkpoint = open_checkpoint(options.model, options.trust_remote_code)
    template = template_of_model(checkpoint, options.template)
    encoder = SampleEncoder(checkpoint, template, None, options.max_length)
    about: dict[str, Any] = {
        "model": str(options.model),
        "weights": hash_json(hash_weights(checkpoint.path)),
        "dtype": options.dtype,
    }
    about |= {
        "template": options.template or template.as_dict(),
        "max_new_tokens": options.max_new_tokens,
        "max_length": options.max_length,
    }
    record(options.output, about)
    answerer = None
    for task in tasks:
        record(task.folder, _record_of(task))
        done = read_lines(task.folder / PREDICTIONS, "id")
        if options.retry_failed and any("failed" in line for line in done.values()):
            done = {key: line for key, line in done.items() if "failed" not in line}
            kept = "".join(json.dumps(line) + "\n" for line in done.values())
            write_atomically(task.folder / PREDICTIONS, kept)
        asked = [question for question in task.questions if (question.id,) not in done]
        if asked:
            if answerer is None:
                model = load_model(checkpoint, dtype=options.dtype).to(options.device)
                answerer = GreedyGenerator(model, encoder, template, options.max_new_tokens)
            _answer(task, asked, answerer, encoder, options)


def _answer(
    task: Task, asked: list[Question], answerer: GreedyGenerator, encoder: SampleEncoder, options: BenchmarkOptions
) -> None:
    asked = sorted(asked, key=lambda question: len(question.text))  # similar lengths share a batch, to reduce padding
    title = f"{task.benchmark.name} ({task.split})"
    done = len(task.questions) - len(asked)
    with (
        (task.folder / PREDICTIONS).open("a", encoding="utf-8") as file,
        Progress(title, len(task.questions), "questions", done=done) as progress,
    ):
        encode = partial(_encode, encoder)
        for batch, prompts in encoded_batches(asked, encode, options.batch_size, options.workers):
            for question, answer in zip(batch, answerer.answer(prompts), strict=True):
                file.write(json.dumps(_line(question, answer)) + "\n")
            file.flush()
            progress.advance(len(batch))


def _encode(encoder: SampleEncoder, question: Question) -> Prompt:
    if IMAGE_MARKER in question.text:
        raise BadSample(Status.SEVERAL_IMAGES, f"the question's text spells out {IMAGE_MARKER}")
    image = question.load()
    return encoder.encode_turns([(question.text, "")], [] if image is None else [image], [question.image])


def _line(question: Question, answer: str | BadSample) -> dict[str, Any]:
    line = {"id": question.id, "question": question.text, "image": question.image, "reference": question.reference}
    if isinstance(answer, BadSample):
        return line | {"failed": answer.status.label, "detail": answer.detail}
    return line | {"prediction": answer}


def _record_of(task: Task) -> dict[str, Any]:
    return {"benchmark": task.benchmark.name, "split": task.split, "fingerprint": task.digest}


def _check_record(task: Task) -> None:
    """Raise InputError unless the folder's answers are to these questions and complete."""
    path = task.folder / RECORD
    name = f"{task.benchmark.name} ({task.split})"
    if not path.is_file():
        raise InputError(f"{task.folder} holds no answers to {name}: run without --score-only first")
    if f"fingerprint: {task.digest}\n" not in path.read_text(encoding="utf-8"):
        raise InputError(f"{task.folder} holds answers to other questions than the files of {name} ask now")
    done = read_lines(task.folder / PREDICTIONS, "id")
    left = sum((question.id,) not in done for question in task.questions)
    if left:
        raise InputError(
            f"{left:,} of {len(task.questions):,} questions of {name} are unanswered: run without --score-only to go on"
        )


def _score(task: Task) -> Result:
    asked = {question.id for question in task.questions}
    lines = [line for line in read_lines(task.folder / PREDICTIONS, "id").values() if line["id"] in asked]
    failed = dict(Counter(line["failed"] for line in lines if "failed" in line))
    predictions: Mapping[str, str] = {line["id"]: line["prediction"] for line in lines if "prediction" in line}
    benchmark, scored = task.benchmark, task.benchmark.splits[task.split].scored
    units = units_of(benchmark, task.questions, predictions) if scored else []
    result = replace(
        score(benchmark, task.split, task.questions, task.strata, units, failed, task.digest),
        split_units=task.split_units,
    )
    if task.limited_to is not None:
        note = f"a sample of {task.limited_to:,} of {task.split_units:,}"
        result = replace(result, limited_to=task.limited_to, note="; ".join(filter(None, (result.note, note))))
    elif not scored and benchmark.submit is not None:
        path = benchmark.submit(task.questions, predictions, task.data, task.folder)
        result = replace(result, submission=str(path.relative_to(task.folder.parent)))
    write_result(task.folder, result, units)
    return result
