"""Write a project folder for a pair of models: configurations, a Makefile with the commands in order, Slurm files, a README.

The files are templates (`templates/`), in which `@{name}` is replaced. The pair is checked before anything is written, as `switchkd
train` does, and the settings that it needs are written into train.yaml with the reason.
"""

import re
import shlex
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from switchkd.counting import counted
from switchkd.data.load_template import CHECKPOINT_TEMPLATE, load_template
from switchkd.data.templates import TEMPLATES as KNOWN
from switchkd.errors import ConfigError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.mixture import mixture_at
from switchkd.pipelines.project.options import NewOptions
from switchkd.pipelines.project.pathway import Pathway, choose_pathway
from switchkd.pipelines.training.options import TrainOptions
from switchkd.printable import printable

TEMPLATES = Path(__file__).parent / "templates"
# Template → where it is written, in the order in which a reader needs them.
FILES = {
    "README.md": "README.md",
    "Makefile": "Makefile",
    "cache.yaml": "cache.yaml",
    "train.yaml": "train.yaml",
    "baseline.yaml": "baseline.yaml",
    "eval.yaml": "eval.yaml",
    "submit.sh": "slurm/submit.sh",
    "cache.sbatch": "slurm/cache.sbatch",
    "train.sbatch": "slurm/train.sbatch",
    "finish.sbatch": "slurm/finish.sbatch",
}
MAX_BATCH = 16  # samples of a device and forward pass, the default of `switchkd train`
CPUS_PER_GPU = 8


@dataclass(frozen=True)
class NewProject:
    """A project folder that was written."""

    out: Path
    files: tuple[str, ...]  # below it
    pathway: Pathway


class _Filled(Template):
    """A template whose placeholders are `@{name}`, since Makefiles and shell scripts use the dollar; `@@` is an `@`."""

    delimiter = "@"


def new_project(options: NewOptions) -> NewProject:
    """Check a pair of models and write a project folder for it; no weights are read.

    Raises:
        ConfigError: `out` exists and is not empty, the global batch cannot be divided among the devices, or an unknown template.
        CheckpointError: a checkpoint cannot be used, or the two do not fit with any settings; see `choose_pathway`.
        OSError: a file cannot be written; then nothing is there.
    """
    _require_new(options.out)
    if mixture_at(options.data) is not None:
        raise ConfigError(
            f"--data {options.data} is a mixture: make the project for one of its data files, and name the mixture as `data` in "
            "its cache.yaml (with `out: stores/`), train.yaml and baseline.yaml"
        )
    if "\n" in f"{options.data}{options.images}":
        raise ConfigError("a line break in the path of the data or of the images cannot be written into a Makefile")
    batch_size = _batch_size(options)
    teacher, student = (open_checkpoint(path, options.trust_remote_code) for path in (options.teacher, options.student))
    template = _template(options, load_template(options.template, teacher).name)
    run = TrainOptions(
        student=options.student,
        teacher=options.teacher,
        data=options.data,
        output=options.out / "runs/student",
        trust_remote_code=options.trust_remote_code,
    )
    pathway = choose_pathway(run, teacher, student)
    values = _values(options, pathway, template, batch_size)
    names = {name: place for name, place in FILES.items() if name != "eval.yaml" or options.eval_data is not None}
    _write(options.out, {place: fill(name, values) for name, place in names.items()})
    return NewProject(options.out, tuple(names.values()), pathway)


def fill(name: str, values: Mapping[str, str]) -> str:
    """Return a template with its placeholders replaced; lines that become empty where a placeholder stood are left out.

    Raises:
        KeyError: a placeholder without a value.
    """
    lines = (TEMPLATES / name).read_text(encoding="utf-8").split("\n")
    filled = [(line, _Filled(line).substitute(values)) for line in lines]
    return "\n".join(made for line, made in filled if made or not line)


def _require_new(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"{out} exists already, and nothing in it is overwritten: name a new folder")


def _batch_size(options: NewOptions) -> int:
    """Return the samples of a device and forward pass: as many as divide the global batch, up to `MAX_BATCH`.

    Raises:
        ConfigError: the devices do not divide the global batch.
    """
    devices = options.nodes * options.gpus
    share, rest = divmod(options.global_batch, devices)
    if rest or not share:
        nearest = max(1, round(options.global_batch / devices)) * devices
        raise ConfigError(
            f"a global batch of {counted(options.global_batch, 'sample')} cannot be divided among "
            f"{counted(options.nodes, 'node')} x {counted(options.gpus, 'GPU')}: "
            f"pass --global-batch {nearest}, or other --nodes and --gpus"
        )
    return max(size for size in range(1, MAX_BATCH + 1) if share % size == 0)


def _template(options: NewOptions, name: str) -> str:
    """Return the template as an option: its name, or the absolute path of its file."""
    asked = options.template
    if asked is None:
        return name
    return asked if asked in (*KNOWN, CHECKPOINT_TEMPLATE) else str(Path(asked).resolve())


def _values(options: NewOptions, pathway: Pathway, template: str, batch_size: int) -> dict[str, str]:
    """Return what replaces each placeholder of the templates."""
    teacher, student, data = (path.resolve() for path in (options.teacher, options.student, options.data))
    images = None if options.images is None else options.images.resolve()
    code = {"trust-remote-code": True if options.trust_remote_code else None}
    reason = f"The reason: {printable(pathway.reason)}." if pathway.reason else ""
    devices = options.nodes * options.gpus
    at_once = (
        f"Samples of an optimizer step over all devices, and of one device at a time: {options.nodes} x {options.gpus} devices "
        f"take {devices * batch_size:,} at a time. Where memory does not suffice, a smaller batch-size gives the same training."
    )
    return {
        "title": f"{student.name} from {teacher.name}",
        "summary": f"Distillation of `{printable(teacher.name)}` into `{printable(student.name)}` with Switch-KD.",
        "teacher": _cell(teacher),
        "student": _cell(student),
        "data": _cell(data),
        "devices": f"{devices:,}",
        "last": str(devices - 1),
        "nodes": str(options.nodes),
        "gpus": str(options.gpus),
        "cpus": str(options.gpus * CPUS_PER_GPU),
        "global_batch": f"{options.global_batch:,}",
        "check_words": _check_words(options, teacher, data, images, template),
        "cache_inputs": _yaml({"teacher": teacher, "data": data, "images": images, "template": template, **code}),
        "out": _yaml({"out": f"stores/{_store_name(data)}.zarr"}),
        "train_inputs": _yaml({"teacher": teacher, "student": student, "data": data, "images": images, **code}),
        "baseline_inputs": _yaml({"student": student, "data": data, "images": images, "template": template, **code}),
        "batches": f"{_comment(at_once)}\n{_yaml({'global-batch': options.global_batch, 'batch-size': batch_size})}",
        "pathway": "\n".join(filter(None, [_comment(f"{pathway.meaning} {reason}".strip()), _yaml(pathway.options)])),
        "pathway_meaning": pathway.meaning,
        "pathway_reason": reason,
        **_scores(options, images, code),
    }


def _scores(options: NewOptions, images: Path | None, code: Mapping[str, Any]) -> dict[str, str]:
    """Return the placeholders about the scores on held-out data; without it they say nothing."""
    data = options.eval_data
    folder = images if options.eval_images is None else options.eval_images.resolve()
    told = {
        "eval_inputs": _yaml({"data": None if data is None else data.resolve(), "images": folder, **code}),
        "eval_targets": "eval ",
        "eval_rules": "eval:  ## score the student on held-out questions\n\t$(SWITCHKD) eval --config eval.yaml\n\n",
        "eval_baseline": "\t$(SWITCHKD) eval --config eval.yaml --model runs/baseline --output eval/baseline",
        "eval_folder": "eval ",
        "eval_words": "eval, ",
        "eval_command": "switchkd eval --config eval.yaml\n",
        "eval_file": ", `eval.yaml`",
        "eval_scores": " and scores",
        "finish_words": "Scores and the report",
        "finish_text": "scores and the report on one",
    }
    if data is not None:
        return told
    return dict.fromkeys(told, "") | {"finish_words": "The report", "finish_text": "and the report on one"}


def _check_words(options: NewOptions, teacher: Path, data: Path, images: Path | None, template: str) -> str:
    """Return the arguments of `data check`, quoted for a shell in a Makefile."""
    words = [data, "--model", teacher, "--template", template]
    words += [] if images is None else ["--images", images]
    words += ["--trust-remote-code"] if options.trust_remote_code else []
    return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")


def _yaml(values: Mapping[str, Any]) -> str:
    """Return options as lines of YAML, named as on the command line; those that are None are left out."""
    plain = {
        name.replace("_", "-"): str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if value is not None
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1 << 16).rstrip() if plain else ""


def _comment(text: str) -> str:
    return textwrap.fill(text, 118, initial_indent="# ", subsequent_indent="# ")


def _cell(path: Path) -> str:
    """Return a path as a cell of a Markdown table."""
    return "`" + printable(path).replace("|", "\\|") + "`"


def _store_name(data: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", data.stem).strip(".-") or "data"


def _write(out: Path, files: Mapping[str, str]) -> None:
    """Write the files of a folder, which appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
        made = Path(unfinished) / "project"
        for place, text in files.items():
            file = made / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        made.rename(out)  # replaces an empty folder
