"""Evaluate a model on a LLaVA-style data file: greedy decoding, exact-match accuracy by question type, stored predictions."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.data.encoded import Prompt
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, Sample, SampleFile
from switchkd.fingerprints import hash_json, hash_weights
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.comparison import Comparison, compare, open_baseline
from switchkd.pipelines.evaluation.generation import GreedyGenerator, encoded_batches, read_lines
from switchkd.pipelines.evaluation.options import RESUMABLE_CHANGES, EvalOptions
from switchkd.pipelines.evaluation.sampling import sample_of
from switchkd.pipelines.model_template import template_of_model
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.run_folder import PREDICTIONS, SCORES, record, to_plain, write_atomically


@dataclass(frozen=True)
class Scores:
    """Exact-match accuracy; every assistant turn of the data file is one question."""

    accuracy: float  # share of correct answers among all questions, 0 … 1
    by_type: dict[str, float]
    questions: int
    skipped: dict[str, int]  # samples that could not be used, by reason; not included in the accuracy
    predictions: Path
    limited_to: int | None = None  # questions of the sample that `--limit` asked; None: all were asked
    baseline: Comparison | None = None  # with `--baseline`


def evaluate(options: EvalOptions) -> Scores:
    """Answer every question of a data file and score the answers; an interrupted run resumes.

    A question is one turn, with the data file's own earlier turns as context. An answer is correct if it equals the data file's
    after both are lower-cased, stripped of surrounding space and a final full stop, and repeated inner space is collapsed.

    Raises:
        InputError: something given cannot be used, or `output` holds predictions of another model or data file, or `baseline`
            none of this data file.
    """
    checkpoint = open_checkpoint(options.model, options.trust_remote_code)
    samples = SampleFile(options.data)
    template = template_of_model(checkpoint, options.template)
    encoder = SampleEncoder(checkpoint, template, options.images, options.max_length)
    identity: dict[str, Any] = {"weights": hash_json(hash_weights(checkpoint.path)), "data_sha256": samples.fingerprint}
    if options.template is None:
        identity["template"] = template.as_dict()
    turns = {f"{s.index}/{turn}": (s, turn) for s in samples for turn in range(len(s.turns))}
    chosen = sample_of(dict.fromkeys(turns, ""), options.limit)
    other = None
    if options.baseline is not None:
        wanted = {(s.index, turn) for key, (s, turn) in turns.items() if key in chosen}
        other = open_baseline(options.baseline, samples.fingerprint, wanted)
    record(options.output, to_plain(options) | identity, RESUMABLE_CHANGES)

    path = options.output / PREDICTIONS
    before = read_lines(path, "row", "turn")
    done = {(row, turn): line for (row, turn), line in before.items() if f"{row}/{turn}" in chosen}
    asked = [(s, turn) for key, (s, turn) in turns.items() if key in chosen and (s.index, turn) not in done]
    # Questions of similar length share a batch, to reduce padding.
    asked.sort(key=lambda question: (question[0].image is None, len(question[0].turns[question[1]][0])))
    skipped = Counter(s.status.label for s in samples if s.status)
    if asked:
        model = load_model(checkpoint, dtype=options.dtype).to(options.device)
        answerer = GreedyGenerator(model, encoder, template, options.max_new_tokens)
        with path.open("a", encoding="utf-8") as file, Progress("answering", len(asked), "questions") as progress:
            encode = partial(_encode, encoder)
            for batch, prompts in encoded_batches(asked, encode, options.batch_size, options.workers):
                for (sample, turn), prediction in zip(batch, answerer.answer(prompts), strict=True):
                    done[sample.index, turn] = line = _line(sample, turn, prediction)
                    file.write(json.dumps(line) + "\n")
                file.flush()
                progress.advance(len(batch))
    scores = _score(list(done.values()), skipped, path, options.limit if len(chosen) < len(turns) else None)
    write_atomically(options.output / SCORES, json.dumps(to_plain(scores), indent=1))
    if other is not None:
        scores = replace(scores, baseline=compare(list(done.values()), other))
        write_atomically(options.output / SCORES, json.dumps(to_plain(scores), indent=1))
    return scores


def normalise(text: str) -> str:
    """Return an answer in the form in which answers are compared."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def _encode(encoder: SampleEncoder, question: tuple[Sample, int]) -> Prompt:
    return encoder.encode_prompt(*question)


def _line(sample: Sample, turn: int, prediction: str | BadSample) -> dict[str, Any]:
    question, answer = sample.turns[turn]
    line = {"row": sample.index, "turn": turn, "id": sample.id, "question_type": sample.question_type}
    line |= {"question": question, "answer": answer}
    if isinstance(prediction, BadSample):
        return line | {"skipped": prediction.status.label}
    return line | {"prediction": prediction, "correct": normalise(prediction) == normalise(answer)}


def _score(lines: list[dict[str, Any]], skipped: Counter[str], path: Path, limited_to: int | None) -> Scores:
    answered = [line for line in lines if "correct" in line]
    skipped = skipped + Counter(line["skipped"] for line in lines if "skipped" in line)
    types = sorted({line["question_type"] for line in answered})
    by_type = {kind: _share([line for line in answered if line["question_type"] == kind]) for kind in types if kind}
    return Scores(_share(answered), by_type, len(answered), dict(skipped), path, limited_to)


def _share(lines: list[dict[str, Any]]) -> float:
    return sum(line["correct"] for line in lines) / len(lines) if lines else 0.0
