"""Options said once: type, default and bounds of a field reach the command line, YAML, recipes and a call from Python."""

import dataclasses
import pickle
import subprocess
import sys
import typing
from pathlib import Path
from typing import Literal

import click
import pytest
import yaml
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.cli.options import grouped
from switchkd.errors import ConfigError
from switchkd.pipelines.ablation.ablate import ablate
from switchkd.pipelines.ablation.options import AblateOptions
from switchkd.pipelines.capture.options import AuditOptions, CacheOptions
from switchkd.pipelines.checkpoints.options import ConvertOptions, InitOptions
from switchkd.pipelines.demo.options import DemoOptions
from switchkd.pipelines.evaluation.options import BenchmarkOptions, EvalOptions
from switchkd.pipelines.options import bounds, fields_of, option, options_class, shown, value_of_option
from switchkd.pipelines.preflight.options import CheckOptions, ShowOptions
from switchkd.pipelines.project.options import NewOptions
from switchkd.pipelines.release.options import ChatOptions, ExportOptions
from switchkd.pipelines.reporting.options import AttendOptions, ReportOptions
from switchkd.pipelines.training.options import Schedule, TrainOptions
from switchkd.settings import BASELINE_OBJECTIVES, HiddenDtype, ImageMode, ObjectiveName, PayloadName, TailPolicy

TRAIN = {"student": Path("s"), "data": Path("d.json"), "output": Path("o")}
CACHE = {"teacher": Path("t"), "data": Path("d.json"), "out": Path("s.zarr")}
EVAL = {"model": Path("m"), "data": Path("d.json"), "output": Path("o")}
COMMANDS = {
    ("train",): (TrainOptions,),
    ("cache-teacher",): (CacheOptions,),
    ("eval",): (EvalOptions, BenchmarkOptions),
    ("store", "audit"): (AuditOptions,),
    ("data", "check"): (CheckOptions,),
    ("data", "show"): (ShowOptions,),
    ("convert",): (ConvertOptions,),
    ("init-student",): (InitOptions,),
    ("ablate",): (AblateOptions,),
    ("report",): (ReportOptions,),
    ("attend",): (AttendOptions,),
    ("export",): (ExportOptions,),
    ("chat",): (ChatOptions,),
    ("demo",): (DemoOptions,),
    ("new",): (NewOptions,),
}
GROUPED = (("train",), ("cache-teacher",), ("eval",))
# Each is refused when the options are made, wherever they come from, and names the option.
REFUSED = [
    (TrainOptions, TRAIN, {"precision": "fp8"}, "precision is one of float32, bfloat16, bfloat16-copies, got 'fp8'"),
    (TrainOptions, TRAIN, {"tail": "studnet"}, "tail is one of student, uniform, floor, got 'studnet'"),
    (TrainOptions, TRAIN, {"group_by": "zzz"}, "group_by is one of none, length, modality-length, got 'zzz'"),
    (TrainOptions, TRAIN, {"profile": "nope"}, "profile is one of ddp, fsdp, zero3, got 'nope'"),
    (TrainOptions, TRAIN, {"schedule": "zigzag"}, "schedule is one of linear, cosine, .*, got 'zigzag'"),
    (TrainOptions, TRAIN, {"teacher_dtype": "fp7"}, "teacher_dtype is one of auto, .*, got 'fp7'"),
    (TrainOptions, TRAIN, {"objective": "dbild"}, "objective is one of sft, .*, got 'dbild'"),
    (TrainOptions, TRAIN, {"switch_adapter": "conv"}, "switch_adapter is linear or mlp, got 'conv'"),
    (TrainOptions, TRAIN, {"payload": "both"}, "payload is topk or hidden, got 'both'"),
    (TrainOptions, TRAIN, {"image_mode": "crop"}, "image_mode is one of own, square, pad, got 'crop'"),
    (TrainOptions, TRAIN, {"stage": "rl"}, "stage is one of pt, dpt, sft, dft, got 'rl'"),
    (TrainOptions, TRAIN, {"mean": "token"}, "mean is position or sample, got 'token'"),
    (TrainOptions, TRAIN, {"teacher_mode": "dead"}, "teacher_mode is cached or live, got 'dead'"),
    (TrainOptions, TRAIN, {"lr": 0}, "lr should be a number above 0, got 0"),
    (TrainOptions, TRAIN, {"lr": "fast"}, "lr should be a number above 0, got 'fast'"),
    (TrainOptions, TRAIN, {"warmup": 2}, "warmup should be a number at least 0 and at most 1, got 2"),
    (TrainOptions, TRAIN, {"batch_size": 0}, "batch_size should be a whole number at least 1, got 0"),
    (TrainOptions, TRAIN, {"steps": 1.5}, "steps should be a whole number at least 1, got 1.5"),
    (TrainOptions, TRAIN, {"window": 1}, "window should be a whole number at least 2, got 1"),
    (TrainOptions, TRAIN, {"temperature": -1.0}, "temperature must be positive, got -1.0"),
    (TrainOptions, TRAIN, {"train_parts": "eyes"}, "no part 'eyes' to train"),
    (TrainOptions, TRAIN, {"objective": "sft"}, "objective sft has no teacher to switch to: pass --no-switch"),
    (TrainOptions, TRAIN, {"objective": "llava-kd", "switch": False}, "pass --teacher-mode live"),
    (TrainOptions, TRAIN, {"teacher_dtype": "int8", "teacher_mode": "live"}, "int8 is for the switch pathway"),
    (TrainOptions, TRAIN, {"switch": False, "switch_adapter": "mlp"}, "--switch-adapter belongs to the switch pathway"),
    (TrainOptions, TRAIN, {"learning_rate": 1}, "no option 'learning_rate'"),
    (CacheOptions, CACHE, {"backend": "jax"}, "backend is transformers or vllm, got 'jax'"),
    (CacheOptions, CACHE, {"payload": "all"}, "payload is one of topk, hidden, both, got 'all'"),
    (CacheOptions, CACHE, {"hidden_dtype": "int4"}, "hidden_dtype is one of steps, float16, bfloat16, got 'int4'"),
    (CacheOptions, CACHE, {"dtype": "fp8"}, "dtype is one of auto, .*, got 'fp8'"),
    (CacheOptions, CACHE, {"k": 1}, "k should be a whole number at least 2, got 1"),
    (CacheOptions, CACHE, {"fine": 1.0}, "0 < fine <= coarse is needed"),
    (CacheOptions, CACHE, {"shard": (2, 2)}, "shard 2/2: the first number runs from 0 to 1"),
    (CacheOptions, CACHE, {"out": Path("store")}, "a store's name ends in .zarr, got store"),
    (CacheOptions, CACHE, {"engine": "spark"}, "engine is local or ray, got 'spark'"),
    (EvalOptions, EVAL, {"dtype": "fp8"}, "dtype is one of auto, .*, got 'fp8'"),
    (EvalOptions, EVAL, {"max_new_tokens": 0}, "max_new_tokens should be a whole number at least 1, got 0"),
]


@pytest.mark.parametrize(("kind", "needed", "change", "message"), REFUSED)
def test_options_check_themselves(kind, needed, change, message):
    with pytest.raises(ConfigError, match=message):
        kind(**(needed | change))
    made = kind(**needed)
    if set(change) <= set(fields_of(kind)):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(made, **change)


def test_what_is_needed_is_named():
    with pytest.raises(ConfigError, match="output is needed: pass --output"):
        TrainOptions(student=Path("s"), data=Path("d"))


def test_a_value_given_by_place_is_named():
    with pytest.raises(ConfigError, match="rate should be a number above 0, got 'fast'"):
        Sample(Path("p"), "fast")


def test_a_class_of_options_is_an_ordinary_dataclass():
    made = TrainOptions(**TRAIN, lr="1e-3", epochs=2)
    assert (made.lr, made.epochs, made.trainer) == (1e-3, 2.0, {})
    assert dataclasses.asdict(made)["lr"] == 1e-3
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.lr = 1.0
    made.trainer["x"] = 1
    assert TrainOptions(**TRAIN).trainer == {}


# ---- where else the words stand


def test_the_words_are_those_of_the_code_that_takes_them():
    from transformers.trainer_utils import SchedulerType

    from switchkd.losses.baselines import BASELINES
    from switchkd.losses.objective import OBJECTIVES
    from switchkd.losses.signals import TAIL_POLICIES
    from switchkd.models.checkpoint import IMAGE_MODES
    from switchkd.models.switch_adapter import KINDS
    from switchkd.pipelines.training.batches.sampler import GROUPINGS
    from switchkd.pipelines.training.live.baseline_terms import KINDS as TERMS
    from switchkd.pipelines.training.parallelism import PROFILES
    from switchkd.pipelines.training.stages import STAGES
    from switchkd.stores.layout import HIDDEN_DTYPES, PAYLOADS

    assert typing.get_args(ObjectiveName) == tuple(OBJECTIVES)
    assert tuple(BASELINES) == tuple(TERMS) == BASELINE_OBJECTIVES
    assert set(typing.get_args(TailPolicy)) == set(TAIL_POLICIES)
    assert typing.get_args(ImageMode) == tuple(IMAGE_MODES)
    assert (typing.get_args(PayloadName), typing.get_args(HiddenDtype)) == (PAYLOADS, HIDDEN_DTYPES)
    assert set(typing.get_args(Schedule)) == {kind.value for kind in SchedulerType}
    words = {name: set(typing.get_args(field.annotation)) for name, field in fields_of(TrainOptions).items()}
    assert words["profile"] == set(PROFILES)
    assert set(typing.get_args(typing.get_args(fields_of(TrainOptions)["group_by"].annotation)[0])) == set(GROUPINGS)
    assert set(typing.get_args(typing.get_args(fields_of(TrainOptions)["stage"].annotation)[0])) == set(STAGES)
    assert set(typing.get_args(typing.get_args(fields_of(TrainOptions)["switch_adapter"].annotation)[0])) == set(KINDS)


# ---- the command line


def command_of(path):
    context, command = click.Context(main, info_name="switchkd"), main
    for name in path:
        command = command.get_command(context, name)
        context = click.Context(command, info_name=name, parent=context)
    return command, context


@pytest.mark.parametrize("path", COMMANDS)
def test_every_field_is_an_option_with_its_default_bounds_and_help(path):
    command, _ = command_of(path)
    options = {parameter.name: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    for kind in COMMANDS[path]:
        for name, field in fields_of(kind).items():
            if shown(field).hidden:
                continue
            found = options[name]
            assert (found.help or "").startswith(field.description or "")
            least, above, most = bounds(field)
            if isinstance(found.type, click.IntRange | click.FloatRange):
                assert (found.type.min, found.type.max) == (above if least is None else least, most)
                assert found.type.min_open == (above is not None)
            if shown(field).unset is None and not field.is_required() and not shown(field).multiple:
                assert found.to_info_dict()["default"] == field.get_default(call_default_factory=True)


@pytest.mark.parametrize("path", GROUPED)
def test_the_help_has_groups_and_what_is_needed_comes_first(path):
    command, context = command_of(path)
    groups = grouped(command, context)
    visible = [option for options in groups.values() for option in options]
    assert {option.name for option in visible} == {
        option.name for option in command.get_params(context) if isinstance(option, click.Option)
    }
    text = CliRunner().invoke(main, [*path, "--help"]).output
    for title in groups:
        assert f"\n{title}:\n" in text
    if path != ("eval",):
        first, five = next(iter(groups.items()))
        assert (first, len(five)) == ("Needed first", 5)


@pytest.mark.parametrize("path", COMMANDS)
def test_help_loads_nothing_heavy(path):
    code = (
        "import sys\nfrom switchkd.cli.main import main\n"
        f"main([*{path!r}, '--help'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'zarr', 'numpy', 'datasets', 'rich', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_config_file_is_checked_as_the_command_line_is(tmp_path):
    file = tmp_path / "c.yaml"
    needed = {name: str(value) for name, value in TRAIN.items()}
    for change, message in (({"precision": "fp8"}, "fp8"), ({"lr": -1}, "-1"), ({"batch_size": "many"}, "many")):
        file.write_text(yaml.safe_dump(needed | change))
        result = CliRunner().invoke(main, ["train", "--config", str(file)])
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


# ---- YAML and recipes


@options_class
class Sample:
    """Options of a test."""

    path: Path = option()
    rate: float = option(default=1.0, above=0)
    count: int | None = option(default=None, at_least=2)
    word: Literal["a", "b", "c"] = option(default="a")
    flag: bool = option(default=False)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rate", "1e-3", 1e-3),
        ("rate", 2, 2.0),
        ("path", "x/y", Path("x/y")),
        ("count", None, None),
        ("flag", True, True),
    ],
)
def test_values_of_yaml(name, value, expected):
    found = value_of_option(Sample, name, value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rate", "fast", "rate cannot be 'fast': it should be a number above 0"),
        ("rate", True, "rate cannot be True"),
        ("count", 1, "count cannot be 1: it should be a whole number at least 2"),
        ("word", "d", "word cannot be 'd': it is one of a, b, c"),
        ("flag", "perhaps", "flag cannot be 'perhaps': it should be true or false"),
        ("nothing", 1, "no option 'nothing'; there are path, rate, count, word, flag"),
    ],
)
def test_values_of_yaml_that_are_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        value_of_option(Sample, name, value)


RECIPE = """
teachers: {t: TEACHER}
students: {s: STUDENT}
stages:
  all: {data: DATA, template: qa, steps: 1}
  sft: {}
evaluate: {data: DATA}
matrix: {scheme: dft, objective: dbild-rkl, switch: true, seed: 0}
"""


@pytest.mark.parametrize(
    "change",
    [{"group_by": "zzz"}, {"profile": "nope"}, {"schedule": "zigzag"}, {"teacher_dtype": "fp7"}, {"precision": "fp8"},
     {"lr": -1}, {"global_batch": 8, "accumulation": 2}, {"switch_adapter": "conv"}],
)  # fmt: skip
def test_ablate_refuses_before_a_store_is_cached(change, tmp_path, teacher, student, monkeypatch):
    content = yaml.safe_load(
        RECIPE.replace("TEACHER", str(teacher))
        .replace("STUDENT", str(student))
        .replace("DATA", str(tmp_path / "d.json"))
    )
    (tmp_path / "d.json").write_text("[]")
    content["stages"]["all"] |= change
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(
        "switchkd.pipelines.ablation.ablate.cache_teacher", lambda *_: pytest.fail("a store was cached first")
    )
    name = next(iter(change)).replace("_", "[-_ ]")
    with pytest.raises(ConfigError, match=name):
        ablate(AblateOptions(recipe=str(tmp_path / "r.yaml"), workdir=tmp_path / "work"))
    assert not (tmp_path / "work").exists() or not any((tmp_path / "work").iterdir())
