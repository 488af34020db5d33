"""Sample questions for the report: each with its image, its reference answer, and the answer of every evaluated model."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.data.images import decode_image, images_of
from switchkd.data.samples import SampleFile
from switchkd.errors import InputError
from switchkd.pipelines.reporting.inputs import EvalRun
from switchkd.pipelines.run_folder import PREDICTIONS

THUMBNAIL = 288  # pixels, the longer side
LOSSLESS = 128  # smaller images are not rescaled


@dataclass(frozen=True)
class Answer:
    """One model's answer."""

    label: str
    text: str
    right: bool | None  # None: not known for a single question


@dataclass(frozen=True)
class SideBySide:
    """One question with the answers of all models."""

    source: str  # data file or benchmark, and row
    question: str
    reference: str
    picture: str | None  # data URI
    no_picture: str  # the reason if there is no image
    answers: list[Answer]


@dataclass(frozen=True)
class Chosen:
    """Questions, and how they were chosen."""

    samples: list[SideBySide]
    shared: int  # questions that all models answered
    differing: int  # of them, where the answers are not all the same


def choose_samples(evals: Sequence[EvalRun], count: int) -> Chosen:
    """Choose questions that every evaluation of one data set answered, evenly spaced over those on which the answers differ.

    The data set is the one that most evaluations share. If fewer than `count` differ, the rest is evenly spaced over the others.
    """
    groups: dict[tuple[str, str], list[tuple[EvalRun, dict[Any, dict[str, Any]]]]] = {}
    for run in evals:
        for source, folder, key in _tables(run):
            groups.setdefault(key, []).append((run, read_predictions(folder / PREDICTIONS, source)))
    if not groups:
        return Chosen([], 0, 0)
    members = max(groups.values(), key=len)
    tables = [lines for _, lines in members]
    shared = [key for key in tables[0] if all("prediction" in lines.get(key, {}) for lines in tables)]
    differing = [key for key in shared if len({lines[key]["prediction"] for lines in tables}) > 1]
    others = [key for key in shared if key not in set(differing)]
    chosen = _spaced(differing, count)
    chosen += _spaced(others, count - len(chosen))
    return Chosen([_side_by_side(key, members) for key in chosen], len(shared), len(differing))


def _tables(run: EvalRun) -> list[tuple[str, Path, tuple[str, str]]]:
    """Return (source, folder with predictions, key that is equal if two evaluations have the same questions)."""
    if not run.on_benchmarks:
        return [("data", run.path, ("data", str(run.options.get("data_sha256"))))]
    names = [(f"{row['name']}-{row['split']}", row["fingerprint"]) for row in run.scores["benchmarks"]]
    return [(name, run.path / name, (name, fingerprint)) for name, fingerprint in names]


def read_predictions(path: Path, source: str) -> dict[Any, dict[str, Any]]:
    """Read predictions by question; an incomplete line is ignored."""
    found: dict[Any, dict[str, Any]] = {}
    if not path.is_file():
        return found
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            found[(line["row"], line["turn"]) if source == "data" else line["id"]] = line | {"source": source}
        except (ValueError, KeyError):
            continue
    return found


def _spaced(keys: list[Any], count: int) -> list[Any]:
    count = max(0, min(count, len(keys)))
    return [keys[i * len(keys) // count] for i in range(count)]


def _side_by_side(key: Any, members: Sequence[tuple[EvalRun, dict[Any, dict[str, Any]]]]) -> SideBySide:
    run, first = members[0][0], members[0][1][key]
    reference = first.get("answer", first.get("reference"))
    picture, why = _picture(run, first)
    answers = [Answer(run.label, lines[key]["prediction"], lines[key].get("correct")) for run, lines in members]
    source = f"row {first['row']}" if first["source"] == "data" else f"{first['source']}, {first['id']}"
    words = reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)
    return SideBySide(source, first["question"], "not public" if reference is None else words, picture, why, answers)


def _picture(run: EvalRun, line: dict[str, Any]) -> tuple[str | None, str]:
    """Return (data URI, "") of a question's image, or (None, why there is none)."""
    try:
        if line["source"] == "data":
            sample = SampleFile(Path(run.options["data"]))[line["row"]]
            folder = run.options.get("images")
            found = images_of(sample, None if folder is None else Path(folder), 1)
            if not found:
                return None, "no image: a question about text alone"
            content, name = found[0], str(sample.image)
        else:
            name = line["image"]
            content = Path(name).read_bytes()
        return thumbnail(content, name), ""
    except (InputError, OSError, KeyError, TypeError, IndexError) as error:
        return None, f"the image cannot be shown: {error}"


def thumbnail(data: bytes, name: str) -> str:
    """Decode an image file and return it, scaled down, as a data URI. Raises BadSample if it is not an image."""
    image = decode_image(data, name)
    small = max(image.size) <= LOSSLESS
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    kind, how = ("png", {}) if small else ("jpeg", {"quality": 85})
    image.save(buffer, kind, **how)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
