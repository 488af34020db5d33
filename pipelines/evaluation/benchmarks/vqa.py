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
    read_json_lines,
    write_submission,
)
from switchkd.pipelines.evaluation.benchmarks.normalise import one_line, textvqa_normal, vqa_normal

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of an answer: min(n / 3, 1), n the equal answers among all but one, averaged over the one left out."""
    equal = [answer == prediction for answer in answers]
    return sum(min((sum(equal) - left_out) / 3, 1.0) for left_out in equal) / len(equal)


def submitted(prediction: str) -> str:
    """Return an answer as it stands in a submission file: normalised, as LLaVA's convert_vqav2_for_submission.py writes it."""
    return textvqa_normal(prediction)


def vqa_accuracy(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Score one question as the server scores the submission file: the answer as submitted, then the rules of vqaEval.py.

    vqaEval.py normalises both sides where human answers differ; where all agree, it compares the submitted answer with theirs.
    """
    (answer,) = answers
    people = [one_line(text) for text in answer.reference]
    prediction = submitted(answer.prediction)
    if len(set(people)) > 1:
        people, prediction = [vqa_normal(text) for text in people], vqa_normal(prediction)
    return (consensus(prediction, people),)


def textvqa_accuracy(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Score one question as the M4C evaluator does: prediction and human answers are always normalised."""
    (answer,) = answers
    return (consensus(textvqa_normal(answer.prediction), [textvqa_normal(text) for text in answer.reference]),)


def _read_vqav2(files: Mapping[str, Path], split: str) -> list[Question]:
    questions, annotations, images = _VQAV2[split]
    place = files[images + "/"]
    if files[questions].suffix == ".jsonl":
        return [
            Question(
                id=str(row["question_id"]),
                text=row["text"].removesuffix(SHORT_ANSWER) + SHORT_ANSWER,
                **image_file(place, row["image"]),
            )
            for row in read_json_lines(files[questions])
        ]
    answers: dict[int, dict[str, Any]] = {}
    if annotations:
        answers = {row["question_id"]: row for row in read_json(files[annotations])["annotations"]}
    out = []
    for row in read_json(files[questions])["questions"]:
        number = row["question_id"]
        if annotations and number not in answers:
            raise DataError(f"{files[annotations]} has no answers to question {number} of {questions}")
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


def _submit_vqav2(
    questions: Sequence[Question], predictions: Mapping[str, str], files: Mapping[str, Path], output: Path
) -> Path:
    """Write [{"question_id", "answer"}] for all of test, which the server requires for test-dev too; "" if not answered."""
    path = files[_VQAV2["test"][0]]
    asked = read_json_lines(path) if path.suffix == ".jsonl" else read_json(path)["questions"]
    ids = [row["question_id"] for row in asked]
    rows = [{"question_id": number, "answer": submitted(predictions.get(str(number), ""))} for number in ids]
    return write_submission(output, "vqa_OpenEnded_results.json", rows)


# Split → questions, annotations, image folder.
_VQAV2 = {
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"),
    "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015"),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json", "", "test2015"),
}
_VQAV2_OF_LLAVA = {_VQAV2[split][0]: f"vqav2/llava_vqav2_mscoco_{split}2015.jsonl" for split in ("test-dev", "test")}
VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    metric="VQA accuracy",
    home="visualqa.org/download.html (questions, annotations, COCO images)",
    source="Goyal et al. 2017; vqaEval.py",
    splits={
        "val": Split((*_VQAV2["val"][:2], "val2014/")),
        "test-dev": Split((_VQAV2["test-dev"][0], _VQAV2["test"][0], "test2015/"), scored=False, llava=_VQAV2_OF_LLAVA),
        "test": Split((_VQAV2["test"][0], "test2015/"), scored=False, llava=_VQAV2_OF_LLAVA),
    },
    read=_read_vqav2,
    judge=vqa_accuracy,
    interval="bootstrap",
    submit=_submit_vqav2,
)


def _read_textvqa(ocr: bool) -> Callable[[Mapping[str, Path], str], list[Question]]:
    def read(files: Mapping[str, Path], split: str) -> list[Question]:
        prompt = _prompts_with_ocr(files[f"TextVQA_Rosetta_OCR_v0.2_{split}.json"]) if ocr else _prompt
        images = files[_TEXTVQA_IMAGES[split] + "/"]
        return [
            Question(
                id=str(row["question_id"]),
                text=prompt(row["image_id"], row["question"]),
                **image_file(images, row["image_id"] + ".jpg"),
                reference=row.get("answers"),
            )
            for row in read_json(files[f"TextVQA_0.5.1_{split}.json"])["data"]
        ]

    return read


def _prompt(image: str, question: str) -> str:
    return question + SHORT_ANSWER


def _prompts_with_ocr(path: Path) -> Callable[[str, str], str]:
    """Return (image, question) → prompt with OCR tokens, from Rosetta's tokens of each image or from LLaVA's file of prompts."""
    if path.suffix != ".jsonl":
        words = {row["image_id"]: row["ocr_tokens"] for row in read_json(path)["data"]}

        def with_tokens(image: str, question: str) -> str:
            return f"{question}\nReference OCR token: {', '.join(words.get(image, []))}{SHORT_ANSWER}"

        return with_tokens
    # LLaVA's file identifies a question by its image and its text, in lower case (eval_textvqa.py).
    prompts = {(row["question_id"], row["text"].split("\n")[0].lower()): row["text"] for row in read_json_lines(path)}

    def from_file(image: str, question: str) -> str:
        if (image, question.lower()) not in prompts:
            raise DataError(f"{path} has no prompt for the question {question!r} about image {image}")
        return str(prompts[image, question.lower()])

    return from_file


def _submit_textvqa(
    questions: Sequence[Question], predictions: Mapping[str, str], files: Mapping[str, Path], output: Path
) -> Path:
    rows = [{"question_id": int(q.id), "answer": submitted(predictions.get(q.id, ""))} for q in questions]
    return write_submission(output, "textvqa_results.json", rows)


_TEXTVQA_OF_LLAVA = {"TextVQA_Rosetta_OCR_v0.2_val.json": "textvqa/llava_textvqa_val_v051_ocr.jsonl"}
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
        splits={"val": Split(files("val"), llava=_TEXTVQA_OF_LLAVA), "test": Split(files("test"), scored=False)},
        read=_read_textvqa(ocr),
        judge=textvqa_accuracy,
        interval="bootstrap",
        submit=_submit_textvqa,
    )


TEXTVQA = _textvqa("textvqa", "TextVQA", ocr=True)
TEXTVQA_NO_OCR = _textvqa("textvqa-no-ocr", "TextVQA without OCR", ocr=False)


def _read_vizwiz(files: Mapping[str, Path], split: str) -> list[Question]:
    out = []
    for row in read_json(files[f"{split}.json"]):
        people = row.get("answers")
        out.append(
            Question(
                id=row["image"],
                text=row["question"] + UNANSWERABLE + SHORT_ANSWER,
                **image_file(files[f"{split}/"], row["image"]),
                reference=None if people is None else [answer["answer"] for answer in people],
                group=row.get("answer_type", ""),
            )
        )
    return out


def _submit_vizwiz(
    questions: Sequence[Question], predictions: Mapping[str, str], files: Mapping[str, Path], output: Path
) -> Path:
    rows = [{"image": q.id, "answer": submitted(predictions.get(q.id, ""))} for q in questions]
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
