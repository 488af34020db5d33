"""The model card of an exported student: method, data, teacher store and scores, from records only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import switchkd
from switchkd.counting import counted
from switchkd.models.checkpoint import Checkpoint
from switchkd.pipelines.evaluation.benchmarks.scoreboard import TABLE
from switchkd.printable import markdown_text, printable

FRONT_MATTER = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [switch-kd, knowledge-distillation, vision-language-model]
---
"""
USE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", backend="pil")  # the pixels of training, with or without torchvision
model = AutoModelForImageTextToText.from_pretrained("{name}")
question = [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```
"""


@dataclass(frozen=True)
class EvalScores:
    """One evaluation of the student."""

    folder: Path
    record: dict[str, Any]  # its run.yaml
    scores: dict[str, Any]  # its scores.json


def model_card(
    name: str, checkpoint: Checkpoint, record: dict[str, Any], summary: dict[str, Any], scores: Sequence[EvalScores]
) -> str:
    """Write the card. Paths on the training machine are reduced to their last component.

    Args:
        name: of the repository or folder. record: the run's options. summary: the run's result.
    """
    origin: dict[str, Any] = summary.get("made_from") or {}
    sections = [
        FRONT_MATTER + f"\n# {markdown_text(name.rpartition('/')[2])}\n",
        "A vision-language student trained with Switch-KD ([arXiv 2604.14629](https://arxiv.org/abs/2604.14629)) by "
        f"switchkd {switchkd.__version__}.\n",
        "## Use\n",
        ("`import switchkd` first: it registers this model's projector.\n\n" if _own_class(checkpoint) else "")
        + USE.format(name=_in_code(name)),
        "## Method\n",
        _rows(_method(record, summary)),
        "## Data\n",
        _rows(_data(checkpoint, record, summary, origin)),
        "## Teacher\n",
        _rows(_teacher(record, origin)),
        f"## {'Losses on held-out samples' if 'kept_by' in summary else 'Last losses'}\n",
        _rows({key.removeprefix("loss_"): f"{value:.4f} nats" for key, value in summary["losses"].items()}),
    ]
    if scores:
        sections += ["## Scores\n", *map(_score_section, scores)]
    return "\n".join(sections)


def _own_class(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.model_type != "llava")


def _rows(rows: dict[str, Any]) -> str:
    return "| | |\n| --- | --- |\n" + "".join(
        f"| {markdown_text(name)} | {markdown_text(value)} |\n" for name, value in rows.items()
    )


def _in_code(name: str) -> str:
    """Return a name for a Python text in quotes, on one line."""
    return json.dumps(printable(name), ensure_ascii=False)[1:-1]


def _name(path: Any) -> str:
    return Path(str(path)).name if path else "none"


def _method(record: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {"objective": record["objective"], "visual switch": "yes" if record["switch"] else "no"}
    if record["objective"] == "switch-ce":
        rows["λ2 (CE on the switch pathway)"] = f"{record['vsd_weight']:g}"
    elif record["objective"] != "sft":
        rows["λ1 (Align), λ2 (VSD)"] = f"{record['align_weight']:g}, {record['vsd_weight']:g}"
        rows["temperature"] = record["temperature"] or "the objective's default"
    if record.get("weight_by"):  # runs of earlier versions do not record it
        rows["positions of Align and VSD weighted by"] = record["weight_by"]
    rows["began as"] = _name(record["student"])
    rows["steps"] = f"{summary['steps']:,}"
    if "kept_by" in summary:
        rows["chosen as the best by"] = summary["kept_by"]
    trained = ("train_parts", "lora", "lora_parts")
    for option in (*trained, "batch_size", "accumulation", "group_by", "lr", "schedule", "precision", "seed"):
        if record.get(option) is not None:
            rows[option.replace("_", " ")] = record[option]
    return rows


def _data(
    checkpoint: Checkpoint, record: dict[str, Any], summary: dict[str, Any], origin: dict[str, Any]
) -> dict[str, Any]:
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary["skipped"].items())) or "none"
    mixed = {
        f"entry {name}": f"{_name(about['data'])}, {about['samples_per_epoch']:,} of {about['usable']:,} usable samples an epoch"
        for name, about in origin.get("mixture", {}).items()
    }
    return {
        "data file": f"{_name(record['data'])}, SHA-256 {origin.get('data', 'not recorded')}",
        **mixed,
        "samples": f"{summary['samples']:,}; skipped: {skipped}",
        "template": (origin.get("template") or {}).get("name", "not recorded"),
        "images": f"{type(checkpoint.image_processor).__name__}, "
        + (f"{checkpoint.image_tokens} tokens each" if checkpoint.image_tokens else "tokens by their size"),
    }


def _teacher(record: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {"teacher": _name(record["teacher"])}
    if signal := origin.get("teacher_signal"):
        rows["its logits"] = signal
    if origin.get("store"):
        rows["teacher store"] = f"identity {origin['store']}"
        rows |= {f"hash of its {part}": value for part, value in (origin.get("teacher") or {}).items()}
    else:
        rows["teacher store"] = "none"
    return rows


def _score_section(found: EvalScores) -> str:
    table = found.folder / TABLE
    if table.is_file():
        return table.read_text(encoding="utf-8")
    scores = found.scores
    sample = "" if scores.get("limited_to") is None else "a sample of "
    rows = {"all": f"{scores['accuracy']:.4f}"} | {kind: f"{share:.4f}" for kind, share in scores["by_type"].items()}
    return (
        f"Exact match on {sample}{markdown_text(_name(found.record['data']))}, "
        f"{counted(scores['questions'], 'question')}, greedy, template "
        f"{markdown_text(found.record['template'])}:\n\n" + _rows(rows)
    )
