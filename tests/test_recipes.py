"""`--config switchkd:NAME`: every shipped recipe is read by the options, agrees between the stages, and is in the documents."""

import json
import re
from itertools import pairwise
from pathlib import Path

import families
import pytest
import tiny
import yaml
from click.testing import CliRunner
from training import logged

from switchkd.cli.main import main
from switchkd.errors import ConfigError
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.options import fields_of, value_of_option
from switchkd.pipelines.run_folder import read_record
from switchkd.pipelines.shipped import PREFIX, RECIPES, recipe_names, recipe_path
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.stages import with_stage

ROOT = Path(__file__).parent.parent
KINDS = {"cache-teacher": CacheOptions, "train": TrainOptions}
NEEDED = {
    "cache-teacher": {"teacher": Path("t"), "data": Path("d"), "out": "s.zarr"},
    "train": {"teacher": Path("t"), "student": Path("s"), "data": Path("d"), "output": Path("o"), "cache": "s.zarr"},
}
FILES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def read(command, name):
    """The options of a recipe, of the types of its command's class."""
    content = yaml.safe_load(recipe_path(command, name).read_text())
    return {option: value_of_option(KINDS[command], option, value) for option, value in content.items()}


@pytest.mark.parametrize("file", FILES)
def test_a_recipe_is_options_of_its_command_each_with_its_reason(file):
    command, name = file.split("/")
    given = read(command, name)
    stage = given.get("stage")
    made = KINDS[command](**NEEDED[command], **(with_stage(stage, given) if stage else given))
    for option, value in given.items():
        assert getattr(made, option) == value != fields_of(KINDS[command])[option].get_default(), (
            f"{option} is the default"
        )
    lines = recipe_path(command, name).read_text().splitlines()
    for before, line in pairwise(lines):
        if not line.startswith("#"):
            assert "  # " in line or before.startswith("# "), f"{file}: {line} says no reason"
    if command == "train":
        for devices in (8, 16, 32):  # one to four nodes of eight; the largest batches of the paper's pair on two
            if made.batch_size * devices <= made.global_batch:
                assert made.accumulated(devices) * made.batch_size * devices == made.global_batch == 128
        assert made.accumulated(8)


@pytest.mark.parametrize("name", recipe_names("train"))
def test_both_stages_of_a_recipe_see_the_same_samples(name):
    cache, train = read("cache-teacher", name), read("train", name)
    for option in ("max_length", "max_pixels", "template"):
        assert cache.get(option) == train.get(option), option
    assert cache["payload"] == "hidden"


def test_the_page_shows_every_recipe_and_each_shows_its_command():
    assert recipe_names("train") == recipe_names("cache-teacher")
    page = (ROOT / "docs/scale.md").read_text()
    table = page[page.index("| recipe |") : page.index("## Paths")]
    first_cells = " ".join(row.split("|")[1] for row in table.splitlines() if "|" in row)
    assert sorted(re.findall(r"`([\w.-]+)`", first_cells)) == recipe_names("train")
    for file in FILES:
        command, name = file.split("/")
        assert f"switchkd {command} --config {PREFIX}{name} " in (RECIPES / f"{file}.yaml").read_text()


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"no recipe 'qwen' for `switchkd train`; there are .*qwen2\.5-vl-7b-to-3b"):
        recipe_path("train", "qwen")
    with pytest.raises(ConfigError, match="no recipe '../train/gemma3-27b-to-4b'"):
        recipe_path("cache-teacher", "../train/gemma3-27b-to-4b")
    for command, said in (("train", "no recipe 'x' for `switchkd train`"), ("eval", "`switchkd eval` has no recipes")):
        done = CliRunner().invoke(main, [command, "--config", "switchkd:x"])
        assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output


def test_a_recipe_runs_end_to_end_on_a_tiny_pair_of_its_family(tmp_path):
    """Eight devices' FSDP and batches are replaced on the command line, which wins; all else is the recipe's."""
    data = tiny.data(tmp_path, tiny.rows(8, text_only=(1,)))
    teacher, student = (families.write_checkpoint("qwen2_5_vl", tmp_path / name, n) for n, name in enumerate("ts"))
    given = ["--config", "switchkd:qwen2.5-vl-7b-to-3b", "--teacher", teacher, "--data", data]
    given += ["--images", tmp_path / "images"]
    store, run = tmp_path / "stores/t.zarr", tmp_path / "run"
    for words in (
        ["cache-teacher", *given, "--out", store],
        ["train", *given, "--student", student, "--cache", store, "--output", run, "--profile", "ddp", "--batch-size", "2",
         "--global-batch", "4"],
    ):  # fmt: skip
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        assert f"options from {RECIPES / words[0]}/qwen2.5-vl-7b-to-3b.yaml" in done.stderr
    record = read_record(run)
    expected = read("train", "qwen2.5-vl-7b-to-3b") | {"profile": "ddp", "batch_size": 2, "global_batch": 4}
    assert {name: record[name] for name in expected} == expected
    assert [entry["loss_vsd"] > 0 for entry in logged(run)] == [True]
    manifest = json.loads((store / "zarr.json").read_text())["attributes"]["switchkd"]
    about = manifest["data"] | manifest if isinstance(manifest["data"], dict) else manifest
    assert (manifest["payload"], "1003520" in json.dumps(about)) == ("hidden", True)
