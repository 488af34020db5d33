"""Recipes: variables, bases, the matrix and what is the same run, option types, and every mistake by name."""

from pathlib import Path

import pytest
import yaml

from switchkd.errors import ConfigError
from switchkd.pipelines.ablation import plan
from switchkd.pipelines.ablation.cells import Cell
from switchkd.pipelines.ablation.options import AblateOptions
from switchkd.pipelines.ablation.plan import plan_jobs
from switchkd.pipelines.ablation.recipe import SHIPPED, read_recipe, shipped_recipes

WORK = Path("work")
CONTENT = {
    "title": "A title",
    "variables": {"teacher": "the teacher's folder"},
    "defaults": {"steps": 3, "seeds": [0, 1]},
    "teachers": {"t": "${teacher}"},
    "students": {"s": "models/s-{seed}"},
    "stages": {
        "all": {"lr": "1e-3", "template": "qa"},
        "pt": {"data": "pt.json", "steps": "${steps}"},
        "sft": {"data": "${workdir}/ft.json"},
        "dft": {"steps": 7},
    },
    "cache": {"k": 8},
    "evaluate": {"data": "test.json"},
    "matrix": {"objective": "dbild-rkl", "seed": "${seeds}"},
}


def recipe_of(tmp_path, settings=("teacher=T",), **changed):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CONTENT | changed, sort_keys=False))
    return read_recipe(str(path), dict(text.split("=", 1) for text in settings), WORK)


def test_variables_keep_their_type_and_paths_are_paths(tmp_path):
    found = recipe_of(tmp_path, ("teacher=T", "steps=5", "seeds=[4]"))
    assert found.stages["pt"] == {"lr": 1e-3, "template": "qa", "data": Path("pt.json"), "steps": 5}
    assert found.stages["dft"]["data"] == WORK / "ft.json"
    assert found.teachers == {"t": "T"}
    assert found.cells == (Cell("s", "pt-dft", "dbild-rkl", True, "t", 4),)


def test_distilled_stages_take_the_options_of_plain_ones_and_their_own(tmp_path):
    found = recipe_of(tmp_path, matrix={"scheme": "dpt-dft"})
    assert set(found.stages) == {"dpt", "dft"}
    assert found.stages["dpt"]["data"] == Path("pt.json")
    assert found.stages["dft"]["steps"] == 7


def test_points_that_are_the_same_run_are_one_cell(tmp_path):
    matrix = {
        "objective": ["sft", "fkl"],
        "switch": [False, True],
        "scheme": ["pt-sft", "pt-dft", "dpt-sft"],
        "seed": 0,
    }
    cells = recipe_of(tmp_path, matrix=matrix).cells
    plain = Cell("s", "pt-sft")
    assert set(cells) == {plain} | {
        Cell("s", scheme, "fkl", switch, "t") for scheme in ("pt-dft", "dpt-sft") for switch in (False, True)
    }
    assert cells[0] == plain


def test_a_list_of_matrices_is_their_union(tmp_path):
    matrix = [{"objective": "sft", "seed": 3}, {"objective": ["fkl", "rkl"], "switch": False, "seed": 3}]
    assert [cell.objective for cell in recipe_of(tmp_path, matrix=matrix).cells] == ["sft", "fkl", "rkl"]


def test_a_base_gives_what_a_recipe_leaves_out(tmp_path):
    recipe_of(tmp_path)
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"base": "mine.yaml", "stages": {"dft": {"lr": 5}}, "matrix": {"seed": 9}}))
    found = read_recipe(str(over), {"teacher": "T"}, WORK)
    assert found.stages["dft"] == {"lr": 5.0, "template": "qa", "data": WORK / "ft.json", "steps": 7}
    assert [cell.seed for cell in found.cells] == [9]
    over.write_text(yaml.safe_dump({"base": "over.yaml", "matrix": {}}))
    with pytest.raises(ConfigError, match="is its own base"):
        read_recipe(str(over), {}, WORK)


def test_options_are_axes_too(tmp_path):
    """They reach the fine-tuning stage alone, and are dropped where they have no effect."""
    matrix = [
        {"objective": "sft", "lr": [1e-3, "3e-3"], "align_weight": 0, "seed": 0},
        {"switch": [False, True], "align_weight": 0, "vsd_weight": 2, "seed": 0},
        {"objective": "switch-ce", "switch": False, "align_weight": 0, "vsd_weight": 2, "seed": 0},
        {"objective": "sft", "steps": 9, "seed": 0},
    ]
    first, second, plain, switched, control, longer = recipe_of(tmp_path, matrix=matrix).cells
    assert (first.lr, second.lr, first.align_weight) == (1e-3, 3e-3, None)
    assert (plain.align_weight, plain.vsd_weight) == (0.0, None)
    assert (switched.align_weight, switched.vsd_weight) == (0.0, 2.0)
    assert (control.switch, control.align_weight, control.vsd_weight) == (True, None, 2.0)
    assert first.options_of("pt") == {} and first.options_of("sft") == {"lr": 1e-3}
    assert switched.options_of("dft") == {"align_weight": 0.0, "vsd_weight": 2.0} and switched.options_of("dpt") == {}
    assert longer.options_of("sft") == {"steps": 9} and str(longer).endswith("steps 9, seed 0")
    assert str(switched).endswith("switch, t, align_weight 0, vsd_weight 2, seed 0")


def test_a_signal_is_what_align_reads(tmp_path):
    """It is an axis of distilled cells that read a store, and changes the options of store and training."""
    signals = {"exact": {"train": {"teacher_mode": "live"}}, "few": {"cache": {"k": 4}, "train": {"tail": "floor"}}}
    matrix = [{"objective": "dbild-rkl", "signal": [None, "exact", "few"], "seed": 0}]
    matrix += [{"objective": ["sft", "llava-kd", "switch-ce"], "signal": ["exact", "few"], "seed": 0}]
    found = recipe_of(tmp_path, signals=signals, matrix=matrix)
    assert [(cell.objective, cell.signal) for cell in found.cells] == [
        ("dbild-rkl", None),
        ("dbild-rkl", "exact"),
        ("dbild-rkl", "few"),
        ("sft", None),
        ("llava-kd", None),
        ("switch-ce", None),
    ]
    assert found.signals == {
        "exact": {"cache": {}, "train": {"teacher_mode": "live"}},
        "few": {"cache": {"k": 4}, "train": {"tail": "floor"}},
    }
    options = AblateOptions(recipe="mine.yaml", workdir=WORK)
    by_default, live, few = (
        job.runs[-1] for job in plan_jobs(found, options) if job.cell and job.cell.objective == "dbild-rkl"
    )
    assert (by_default.cache.k, by_default.options.tail) == (8, "student")
    assert (live.cache, live.options.teacher_mode, live.options.cache) == (None, "live", None)
    assert (few.cache.k, few.options.tail) == (
        4,
        "floor",
    ) and few.options.cache == few.cache.out != by_default.cache.out
    for wrong, message in (
        ({"few": {"store": {}}}, "signals: few has no 'store'"),
        ({"few": 3}, "signals: few should hold options below cache and train"),
        ({"few": {"cache": {"k": 1}}}, "signals: few: cache: .*k"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe_of(tmp_path, signals=wrong, matrix={"signal": "few"})
    with pytest.raises(ConfigError, match="has no signal 'other'; there are none"):
        recipe_of(tmp_path, matrix={"signal": "other"})


def test_arms_are_one_cell_for_each_seed(tmp_path):
    matrix = [
        {"objective": "sft", "seed": [0, 1]},
        {"switch": [False, True], "align_weight": [None, 0], "seed": [0, 1]},
    ]
    arms = {
        "plain": {"objective": "sft"},
        "both": {"switch": True, "align_weight": None},
        "vsd": {"switch": True, "align_weight": 0},
    }
    found = recipe_of(tmp_path, matrix=matrix, compare={"arms": arms, "pairs": [["both", "plain"], ["both", "vsd"]]})
    assert found.compare.pairs == (("both", "plain"), ("both", "vsd"))
    assert recipe_of(tmp_path).compare is None
    for compare, message in (
        (
            {"arms": {"a": {"switch": True}}, "pairs": []},
            "the arm a should be one cell of the matrix for each seed, it is 4",
        ),
        ({"arms": {"a": {"objective": "rkl"}}, "pairs": []}, "it is 0 cells"),
        ({"arms": {"a": {"seed": 1}}, "pairs": []}, "the arm a has no 'seed'"),
        ({"arms": arms, "pairs": [["both", "nobody"]]}, "pairs should be pairs of plain, both, vsd"),
        ({"arms": arms}, "compare should hold arms, by name, and pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe_of(tmp_path, matrix=matrix, compare=compare)


def test_the_registered_experiment_has_its_arms():
    """docs/evidence.md registers them."""
    found = read_recipe("evidence", {"lr_vsd": "0.003"}, WORK)
    cells = [cell for cell in found.cells if cell.seed == 0]
    assert [(c.objective, c.switch, c.align_weight) for c in cells] == [
        ("sft", False, None),
        ("sft", False, None),
        ("dbild-rkl", False, None),
        ("dbild-rkl", True, 0.0),
        ("dbild-rkl", True, None),
        ("switch-ce", True, None),
        ("llava-kd", False, None),
    ]
    assert [cell.steps for cell in cells] == [None, 6300, None, None, None, None, None]
    assert [cell.lr for cell in cells] == [0.001, 0.001, 0.001, 0.003, 0.001, 0.001, 0.001]
    pairs = [("Switch-KD", "Align"), ("Switch-KD", "SFT"), ("Switch-KD", "SFT at equal FLOP"), ("VSD", "switch-CE")]
    pairs += [("switch-CE", "SFT"), ("Align", "SFT"), ("Switch-KD", "VSD")]
    assert list(found.compare.pairs) == pairs
    tuned = read_recipe("evidence-tune", {}, WORK)
    assert [(c.objective, c.switch, c.align_weight) for c in tuned.cells[::3]] == [
        (c.objective, c.switch, c.align_weight) for c in cells if c.steps is None
    ]
    assert tuned.evaluate["data"].name == "val.json" and found.evaluate["data"].name == "primary.json"
    assert not {cell.seed for cell in tuned.cells} & {cell.seed for cell in found.cells}


def test_the_pilot_has_the_arms_and_steps_that_are_registered():
    """docs/evidence.md, B: the student that ships, 800 steps, SFT also at equal FLOP, one rate and a smaller one of the tower."""
    found = read_recipe("evidence-pilot", {}, WORK)
    cells = [cell for cell in found.cells if cell.seed == 0]
    assert [(c.objective, c.switch, c.align_weight, c.steps) for c in cells] == [
        ("sft", False, None, None),
        ("sft", False, None, 1680),
        ("dbild-rkl", False, None, None),
        ("dbild-rkl", True, 0.0, None),
        ("dbild-rkl", True, None, None),
        ("switch-ce", True, None, None),
    ]
    assert {(cell.student, cell.lr) for cell in cells} == {("pretrained", 0.001)}
    assert (found.students["pretrained"], found.teachers["large"]) == ({"shipped": "student"}, {"shipped": "teacher"})
    options = AblateOptions(recipe="evidence-pilot", workdir=WORK)
    runs = {run.options.objective: run.options for job in plan_jobs(found, options) for run in job.runs}
    for run in runs.values():
        assert (run.lr_vision, run.batch_size, run.precision) == (0.0003, 32, "bfloat16")
        assert run.data.name == "conversations.json"
    assert runs["switch-ce"].steps == 800
    assert {name for pair in found.compare.pairs for name in pair} == set(found.compare.arms)


MISTAKES = {
    "an option axis out of bounds": (
        {"matrix": {"lr": -1}},
        ("teacher=T",),
        "matrix: lr cannot be -1: it should be a number above 0",
    ),
    "two kinds of data": ({"easy_vqa": {}, "emoji_vqa": {}}, ("teacher=T",), "easy_vqa and emoji_vqa both make data"),
    "a variable without value": ({}, (), r"also needs:\n  --set teacher=…  \(the teacher's folder\)"),
    "an unknown variable": ({}, ("teachr=T",), "has no variable 'teachr'; there are teacher, steps, seeds"),
    "a variable that is listed once": ({}, ("teacher=T", "teachr=T"), "there are teacher, steps, seeds$"),
    "an unknown entry": ({"matrx": {}}, ("teacher=T",), "a recipe has no 'matrx'"),
    "an unknown axis": (
        {"matrix": {"colour": 1}},
        ("teacher=T",),
        "matrix has no 'colour'; there are align_weight, lr, objective",
    ),
    "an unknown objective": ({"matrix": {"objective": "kl"}}, ("teacher=T",), "no objective 'kl'; there are sft, fkl"),
    "an unknown stage": ({"matrix": {"scheme": "pt-xft"}}, ("teacher=T",), "no stage 'xft' in 'pt-xft'"),
    "an unknown student": ({"matrix": {"student": "x"}}, ("teacher=T",), "no student 'x'; there are s"),
    "an unknown teacher": ({"matrix": {"teacher": "x"}}, ("teacher=T",), "no teacher 'x'; there are t"),
    "a switch that is no switch": ({"matrix": {"switch": "on it"}}, ("teacher=T",), "switch is true or false"),
    "an unknown option": ({"stages": {"all": {"data": "d", "stepz": 1}}}, ("teacher=T",), "stages: pt has no 'stepz'"),
    "an option that cells decide": (
        {"stages": {"all": {"data": "d", "seed": 1}}},
        ("teacher=T",),
        "stages: pt has no 'seed'",
    ),
    "an option of another type": ({"cache": {"k": "many"}}, ("teacher=T",), "cache: k cannot be 'many'"),
    "an unknown tail": ({"stages": {"all": {"data": "d", "tail": "long"}}}, ("teacher=T",), "tail cannot be 'long'"),
    "no data file": ({"stages": {}}, ("teacher=T",), "stages: pt gives no data file"),
    "no matrix": ({"matrix": []}, ("teacher=T",), "the matrix is empty"),
    "entries without names": ({"cache": [1]}, ("teacher=T",), "cache should hold entries by name"),
    "a teacher trained in an unknown way": (
        {"teachers": {"t": {"train": {"dft": {}}}}},
        ("teacher=T",),
        "teachers: train has no 'dft'; there are pt, sft",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(tmp_path, mistake):
    changed, settings, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        recipe_of(tmp_path, settings, **changed)


def test_a_recipe_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match="no recipe 'table99': pass a YAML file, or one of .*table3-small, table3"):
        read_recipe("table99", {}, WORK)


def test_every_table_has_its_recipe_and_its_small_twin():
    tables = {f"table{n}" for n in (3, 4, 5, 6)}
    shipped = set(shipped_recipes())
    evidence = {"evidence", "evidence-tune", "evidence-pilot"}
    small = {"peers-small", "switch-small", "switch-small-tune", "fidelity-small"}
    assert shipped == {"table1", "table2"} | small | evidence | tables | {f"{name}-small" for name in tables}


def needed_by(name):
    """A value for every variable that a shipped recipe may need."""
    if "-small" in name or name.startswith("evidence"):
        return {}
    contents = [yaml.safe_load((SHIPPED / f"{file}.yaml").read_text()) for file in ("paper", name)]
    return {variable: f"/{variable}" for content in contents for variable in content.get("variables", {})}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_can_be_read(name):
    found = read_recipe(name, needed_by(name), WORK)
    seeds = {"evidence": 8, "evidence-pilot": 3}.get(name, 3 if name.endswith("small") else 1)
    assert len({cell.seed for cell in found.cells}) == seeds


# Names of table3-small's first cell of each row and of its store, as the version before `signal` and `steps` gave them.
NAMED = [
    ["34ff3947742f.json", "pt-958e3f5e514d", "sft-1c878fda0407"],
    ["803c12b79ec4.json", "pt-958e3f5e514d", "dft-946a5e01d003"],
    ["1e8f93675324.json", "pt-958e3f5e514d", "dft-96af56e6c26b"],
]
STORES = {"large-dft-236edeacf5ec.zarr"}


def test_names_of_earlier_versions_stay_the_same(monkeypatch):
    """An ablation that an earlier version began goes on: runs, stores and results are found by names that hash their options."""
    found = read_recipe("table3-small", {}, WORK)
    monkeypatch.setattr(plan, "precision_here", lambda: "float32")  # whatever the machine computes in
    jobs = list(plan_jobs(found, AblateOptions(recipe="table3-small", workdir=WORK)))
    named = [[job.result.name, *(run.options.output.name for run in job.runs)] for job in (jobs[1], jobs[4], jobs[7])]
    stores = {run.cache.out.name for job in jobs for run in job.runs if run.cache is not None}
    assert (named, stores) == (NAMED, STORES)


def rows_of(name):
    found = read_recipe(name, needed_by(name), WORK)
    return [
        (c.student, c.scheme, c.objective, c.switch, c.teacher) for c in found.cells if c.seed == found.cells[0].seed
    ]


def test_the_rows_are_those_of_the_papers_tables():
    plain = ("pt-sft", "sft", False, None)
    assert rows_of("table1") == [
        ("0.5b", *plain),
        ("0.5b", "dpt-sft-dft", "llava-kd", False, "3b"),
        ("0.5b", "pt-dft", "dbild-rkl", True, "3b"),
        ("1.5b", *plain),
        ("1.5b", "dpt-sft-dft", "llava-kd", False, "7b"),
        ("1.5b", "pt-dft", "dbild-rkl", True, "7b"),
    ]
    assert [row[1:4] for row in rows_of("table2")] == [
        plain[:3],
        ("pt-dft", "align-kd", False),
        ("pt-dft", "dbild-rkl", True),
    ]
    assert rows_of("table3") == [
        ("0.5b", "pt-sft", "sft", False, None),
        ("0.5b", "pt-dft", "dbild-rkl", False, "3b"),
        ("0.5b", "pt-dft", "dbild-rkl", True, "3b"),
    ]
    names = ["fkl", "rkl", "bild-fkl", "bild-rkl", "dbild-fkl", "dbild-rkl"]
    assert rows_of("table4") == [("0.5b", "pt-dft", name, False, "3b") for name in names]
    schemes = [row[1] for row in rows_of("table5")]
    assert schemes == ["pt-sft", "dpt-sft", "pt-dft", "dpt-dft"]
    assert [(row[4], row[0]) for row in rows_of("table6")] == [(t, s) for s in ("0.5b", "1.5b") for t in ("3b", "7b")]


@pytest.mark.parametrize("table", ("table3", "table4", "table5"))
def test_a_twin_has_the_rows_of_its_table(table):
    assert [row[1:4] for row in rows_of(f"{table}-small")] == [row[1:4] for row in rows_of(table)]
