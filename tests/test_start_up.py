"""Row 27 of the faults found by outside trials: a command that needs no torch does not import it, and starts within a second.

Each command runs in a process of its own, or several mistakes one after the other in one process, which then must not have imported
what takes seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tiny
import tokenizers_by_kind
import yaml

from switchkd.cli.main import COMMANDS, main
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import AuditOptions, CacheOptions
from switchkd.pipelines.checkpoints.options import ConvertOptions, InitOptions
from switchkd.pipelines.evaluation.options import BenchmarkOptions, EvalOptions
from switchkd.pipelines.options import fields_of, shown
from switchkd.pipelines.preflight.options import CheckOptions, ShowOptions
from switchkd.pipelines.project.options import NewOptions
from switchkd.pipelines.release.options import ChatOptions, ExportOptions
from switchkd.pipelines.reporting.options import AttendOptions, ReportOptions
from switchkd.pipelines.run_folder import to_plain
from switchkd.pipelines.training.options import TrainOptions

CPU_SECONDS = 1.0  # of a command; 2 are allowed, since other processes of the machine disturb the count
STORE = Path(__file__).parent / "fixtures/format_1"

SCRIPT = """
import json, resource, sys
from switchkd.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        heavy = [name for name in ("torch", "transformers") if name in sys.modules]
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps([words, end.code, heavy, used.ru_utime + used.ru_stime]), flush=True)
"""


def run(*commands, folder=None):
    """Run commands in one process: [words, exit code, heavy modules, CPU seconds so far] of each, and what was printed."""
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)], capture_output=True, text=True, check=True, cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[["')]
    assert len(lines) == len(commands), done.stdout + done.stderr
    return lines, done.stdout + done.stderr


def light(*command, code=0, folder=None):
    ((_, exit_code, heavy, seconds),), output = run(command, folder=folder)
    assert exit_code == code, output
    assert heavy == []
    assert seconds < 2 * CPU_SECONDS
    return output


def test_help_about_families():
    assert "model families" in light("models", "--help")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_check_of_data_without_a_model(tmp_path, workers):
    data = tiny.data(tmp_path, tiny.rows(6))
    (tmp_path / "images/002.png").unlink()
    output = light("data", "check", data, "--images", tmp_path / "images", "--workers", workers)
    assert "image_missing" in output


def test_training_of_a_finished_run(tmp_path):
    given = {name: tmp_path / name for name in ("student", "data", "output")}
    options = TrainOptions(**given, objective="sft", switch=False, steps=2, accumulation=1, global_batch=16)
    options.output.mkdir()
    (options.output / "run.yaml").write_text(yaml.safe_dump(to_plain(options)))
    summary = {"steps": 2, "samples": 7, "skipped": {}, "losses": {"loss_ce": 1.5}}
    (options.output / "summary.json").write_text(json.dumps(summary))
    words = ["train", *(word for name, path in given.items() for word in (f"--{name}", path))]
    words += ["--objective", "sft", "--no-switch", "--steps", 2]
    assert "was already trained for 2 steps on 7 samples" in light(*words)
    assert "lr: run 2e-05, now 0.5" in light(*words, "--lr", 0.5, code=2)


@pytest.mark.parametrize("words", [("info",), ("status",), ("verify",), ("repair",)], ids=" ".join)
def test_commands_about_a_store(words, tmp_path):
    name = next(path for path in sorted(STORE.rglob("zarr.json")) if path.parent.suffix == ".zarr").parent
    shutil.copytree(name, tmp_path / "s.zarr")
    light("store", *words, tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("words", "code"),
    [(("ablate", "--list"), 0), (("ablate", "nowhere.yaml"), 2), (("ablate", "table3"), 2), (("eval", "--list"), 0)],
)
def test_lists_and_recipes_with_a_mistake(words, code, tmp_path):
    light(*words, code=code, folder=tmp_path)


IMPORTS = """
import resource, sys
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Trainer, TrainingArguments
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""
UNTIL_PLAN = """
import logging, os, resource, sys
import switchkd.cli.train as command
class Plan(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("objective: "):
            used = resource.getrusage(resource.RUSAGE_SELF)
            print(used.ru_utime + used.ru_stime, flush=True)
            os._exit(0)
quiet = command.quiet_libraries
def told():
    quiet()
    logging.getLogger("switchkd").handlers = [Plan()]
command.quiet_libraries = told
from switchkd.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_training_says_what_it_will_do_within_3_seconds_beyond_imports(tmp_path):
    """Of CPU, beyond the import of torch and of what it needs of transformers; with vocabularies of Qwen's size."""
    words_of = tokenizers_by_kind.large(150_000)
    teacher, student = (
        tiny.checkpoint(tmp_path / name, seed=seed, width=width, words_of=words_of)
        for name, seed, width in (("teacher", 1, 32), ("student", 2, 16))
    )
    data = tiny.data(tmp_path / "d", tiny.rows(4))
    given = {"data": data, "images": data.parent / "images"}
    cache_teacher(CacheOptions(teacher=teacher, out=tmp_path / "s.zarr", template="qa", **given))
    given |= {"student": student, "teacher": teacher, "cache": tmp_path / "s.zarr", "output": tmp_path / "run"}
    words = ["train", *(str(word) for name, path in given.items() for word in (f"--{name}", path)), "--batch-size", "2"]

    def seconds(script, *words):
        command = [sys.executable, "-c", script, *words]
        done = [
            subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            for _ in range(2)
        ]
        assert all(one.returncode == 0 for one in done), done[0].stdout + done[0].stderr
        return min(float(one.stdout.splitlines()[-1]) for one in done)

    assert seconds(UNTIL_PLAN, *words) - seconds(IMPORTS) < 3


def paths_of(command):
    """Return the parameters of a command that name something that must exist: (click parameter, what it names)."""
    kinds = {
        "cache-teacher": [CacheOptions], "train": [TrainOptions], "eval": [EvalOptions, BenchmarkOptions],
        "data check": [CheckOptions], "data show": [ShowOptions], "convert": [ConvertOptions], "init-student": [InitOptions],
        "export": [ExportOptions], "chat": [ChatOptions], "attend": [AttendOptions], "store audit": [AuditOptions],
        "report": [ReportOptions], "new": [NewOptions],
    }.get(command, [])  # fmt: skip
    named = {name: shown(field).names for kind in kinds for name, field in fields_of(kind).items()}
    return {name: what for name, what in named.items() if what is not None}


def walk():
    """Yield (name, click command) of every command."""
    for name in COMMANDS:
        command = main.get_command(None, name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {child}", inner) for child, inner in command.commands.items())
        else:
            yield name, command


# Paths that are written, or may be missing: (command, parameter).
WRITTEN = {"out", "output", "target", "report", "workdir", "config", "packages"}


def test_every_path_option_says_what_it_names():
    for name, command in walk():
        for parameter in command.params:
            is_path = type(parameter.type).__name__ in ("Path", "_StorePath")
            if is_path and parameter.name not in WRITTEN and name not in ("attend", "store info", "store status"):
                if name.startswith("store ") and name != "store audit":
                    continue  # they import no torch at all
                assert parameter.name in paths_of(name), f"{name} {parameter.name}: say what it names, see Shown.names"


def test_a_mistyped_path_of_any_command(tmp_path):
    """Every option of every command in turn names what is not there, the others what is."""
    data = tiny.data(tmp_path / "d", tiny.rows(2))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "folder").mkdir()
    good = {
        "checkpoint": model, "model folder": model, "data": data, "images": data.parent / "images", "folder": tmp_path / "folder",
        "image": data.parent / "images/000.png", "store": tmp_path / "store.zarr",
    }  # fmt: skip
    commands = []
    for name, command in walk():
        for wrong in paths_of(name):
            extra = ["--task", "gqa"] if name == "eval" and wrong in ("benchmarks", "baseline") else []
            words = [*name.split(), *extra]
            for parameter in command.params:
                what = paths_of(name).get(parameter.name)
                needed = (
                    parameter.required
                    or parameter.name == wrong
                    or (name == "eval" and parameter.name in ("model", "data"))
                )
                if extra and parameter.name in ("data", "images"):
                    continue
                if extra and parameter.name == "benchmarks":
                    needed = True
                if not needed:
                    continue
                value = tmp_path / "nowhere" if parameter.name == wrong else good.get(what, tmp_path / "new.zarr")
                if parameter.name in ("questions",):
                    value = "what ?"
                if parameter.name == "images" and name == "attend":
                    value = good["image"]
                words += [value] if parameter.param_type_name == "argument" else [parameter.opts[0], value]
            commands.append(words)
    assert len(commands) > 25
    lines, output = run(*commands)
    for words, code, heavy, _ in lines:
        assert (code, heavy) == (2, []), (words, output)
    assert "Traceback" not in output
    assert lines[-1][-1] < 3 * CPU_SECONDS  # all of them together
