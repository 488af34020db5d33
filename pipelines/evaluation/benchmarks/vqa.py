"""VQAv2, TextVQA and VizWiz: the VQA accuracy against ten human answers.

VQAv2: Goyal et al. 2017, official script vqaEval.py. TextVQA: Singh et al. 2019, `TextVQAAccuracyEvaluator` of MMF's M4C
evaluator, prompts of LLaVA-1.5 (its reference OCR tokens are Rosetta's). VizWiz: Gurari et al. 2018, the VizWiz API, a copy
of vqaEval.py; prompt of LLaVA-1.5.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.base import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    Split,
    image_file,
    read_json,
    write_submission,
)
from switchkd.pipelines.evaluation.benchmarks.normalise import one_line, textvqa_normal, vqa_normal

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of an answer: min(n / 3, 1), n the equal answers among all but one, averaged over the one left out."""
    equal = [answer == prediction for answer in answers]
    return sum(min((sum(equal) - left_out) / 3, 1.0) for left_out in equal) / len(equal)


def vqa_accuracy(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Score one question as vqaEval.py does: if all human answers agree, only case and surrounding space are normalised."""
    (answer,) = answers
    people = [one_line(text) for text in answer.reference]
    prediction = one_line(answer.prediction)
    if len(set(people)) > 1:
        people, prediction = [vqa_normal(text) for text in people], vqa_normal(prediction)
    return (consensus(prediction.lower(), [text.lower() for text in people]),)


def textvqa_accuracy(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Score one question as the M4C evaluator does: prediction and human answers are always normalised."""
    (answer,) = answers
    return (consensus(textvqa_normal(answer.prediction), [textvqa_normal(text) for text in answer.reference]),)


def _read_vqav2(folder: Path, split: str) -> list[Question]:
    questions, annotations, images = _VQAV2[split]
    place = folder / images
    answers: dict[int, dict[str, Any]] = {}
    if annotations:
        answers = {row["question_id"]: row for row in read_json(folder / annotations)["annotations"]}
    out = []
    for row in read_json(folder / questions)["questions"]:
        number = row["question_id"]
        if annotations and number not in answers:
            raise DataError(f"{folder / annotations} has no answers to question {number} of {questions}")
        found = answers.get(number)
        out.append(
            Question(
                id=str(number),
                text=row["question"] + SHORT_ANSWER,
                **image_file(place, f"COCO_{images}_{row['image_id']:012d}.jpg"),
                reference=None if found is None else [answer["answer"] for answer in found["answers"]],
                group="" if found is None else found["answer_type"],
            )
        )
    return out


def _submit_vqav2(questions: Sequence[Question], predictions: Mapping[str, str], folder: Path, output: Path) -> Path:
    """Write [{"question_id", "answer"}] for all of test, which the server requires for test-dev too; "" if not answered."""
    ids = [row["question_id"] for row in read_json(folder / _VQAV2["test"][0])["questions"]]
    rows = [{"question_id": number, "answer": textvqa_normal(predictions.get(str(number), ""))} for number in ids]
    return write_submission(output, "vqa_OpenEnded_results.json", rows)


# Split → questions, annotations, image folder.
_VQAV2 = {
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"),
    "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015"),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json", "", "test2015"),
}
VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    metric="VQA accuracy",
    home="visualqa.org/download.html (questions, annotations, COCO images)",
    source="Goyal et al. 2017; vqaEval.py",
    splits={
        "val": Split((*_VQAV2["val"][:2], "val2014/")),
        "test-dev": Split((_VQAV2["test-dev"][0], _VQAV2["test"][0], "test2015/"), scored=False),
        "test": Split((_VQAV2["test"][0], "test2015/"), scored=False),
    },
    read=_read_vqav2,
    judge=vqa_accuracy,
    interval="bootstrap",
    submit=_submit_vqav2,
)


def _read_textvqa(ocr: bool) -> Callable[[Path, str], list[Question]]:
    def read(folder: Path, split: str) -> list[Question]:
        words: dict[str, list[str]] = {}
        if ocr:
            rows = read_json(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json")["data"]
            words = {row["image_id"]: row["ocr_tokens"] for row in rows}
        out = []
        for row in read_json(folder / f"TextVQA_0.5.1_{split}.json")["data"]:
            hint = "\nReference OCR token: " + ", ".join(words.get(row["image_id"], [])) if ocr else ""
            images = folder / _TEXTVQA_IMAGES[split]
            out.append(
                Question(
                    id=str(row["question_id"]),
                    text=row["question"] + hint + SHORT_ANSWER,
                    **image_file(images, row["image_id"] + ".jpg"),
                    reference=row.get("answers"),
                )
            )
        return out

    return read


def _submit_textvqa(questions: Sequence[Question], predictions: Mapping[str, str], folder: Path, output: Path) -> Path:
    rows = [{"question_id": int(q.id), "answer": textvqa_normal(predictions.get(q.id, ""))} for q in questions]
    return write_submission(output, "textvqa_results.json", rows)


_TEXTVQA_IMAGES = {"val": "train_images", "test": "test_images"}


def _textvqa(name: str, title: str, ocr: bool) -> Benchmark:
    def files(split: str) -> tuple[str, ...]:
        tokens = (f"TextVQA_Rosetta_OCR_v0.2_{split}.json",) if ocr else ()
        return (f"TextVQA_0.5.1_{split}.json", *tokens, _TEXTVQA_IMAGES[split] + "/")

    return Benchmark(
        name=name,
        title=title,
        folder="textvqa",
        metric="VQA accuracy, " + ("OCR tokens in the prompt" if ocr else "image and question alone"),
        home="textvqa.org/dataset (TextVQA v0.5.1, Rosetta OCR tokens v0.2, images)",
        source="Singh et al. 2019; TextVQAAccuracyEvaluator (MMF, M4C)",
        splits={"val": Split(files("val")), "test": Split(files("test"), scored=False)},
        read=_read_textvqa(ocr),
        judge=textvqa_accuracy,
        interval="bootstrap",
        submit=_submit_textvqa,
    )


TEXTVQA = _textvqa("textvqa", "TextVQA", ocr=True)
TEXTVQA_NO_OCR = _textvqa("textvqa-no-ocr", "TextVQA without OCR", ocr=False)


def _read_vizwiz(folder: Path, split: str) -> list[Question]:
    out = []
    for row in read_json(folder / f"{split}.json"):
        people = row.get("answers")
        out.append(
            Question(
                id=row["image"],
                text=row["question"] + UNANSWERABLE + SHORT_ANSWER,
                **image_file(folder / split, row["image"]),
                reference=None if people is None else [answer["answer"] for answer in people],
                group=row.get("answer_type", ""),
            )
        )
    return out


def _submit_vizwiz(questions: Sequence[Question], predictions: Mapping[str, str], folder: Path, output: Path) -> Path:
    rows = [{"image": q.id, "answer": textvqa_normal(predictions.get(q.id, ""))} for q in questions]
    return write_submission(output, "vizwiz_results.json", rows)


VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz",
    folder="vizwiz",
    metric="VQA accuracy",
    home="vizwiz.org/tasks-and-datasets/vqa (Annotations.zip, val.zip, test.zip)",
    source="Gurari et al. 2018; VizWiz API, vqaEval.py",
    splits={"val": Split(("val.json", "val/")), "test": Split(("test.json", "test/"), scored=False)},
    read=_read_vizwiz,
    judge=vqa_accuracy,
    interval="bootstrap",
    submit=_submit_vizwiz,
)
