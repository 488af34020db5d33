"""`trainer:` in a config file: what switchkd computes itself is refused by name, and nothing is ignored without a word."""

from dataclasses import fields

import click
import pytest
import training
from transformers import TrainingArguments

from switchkd.cli.main import main
from switchkd.errors import ConfigError
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.trainer_entries import ALLOWED, REFUSED

cached, options = training.cached, training.options
NEEDED = {"student": "s", "data": "d.json", "output": "o", "teacher": "t", "cache": "c"}


def test_every_argument_of_transformers_is_allowed_or_refused():
    """A new version of transformers may bring new ones: each needs a decision."""
    known = {field.name for field in fields(TrainingArguments)}
    assert REFUSED.keys() & ALLOWED == set()
    assert known - REFUSED.keys() - ALLOWED == set()
    # Other versions that are supported may lack some, but no name is made up.
    assert len((REFUSED.keys() | ALLOWED) - known) <= 5


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_says_what_to_use(name):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**NEEDED, trainer={"adam_beta2": 0.95, name: 1})
    assert str(caught.value) == f"trainer: {name} is refused: {REFUSED[name]}"


def test_every_option_that_is_named_exists():
    command = main.get_command(click.Context(main), "train")
    shown = {option for parameter in command.params for option in parameter.opts}
    for advice in REFUSED.values():
        for word in advice.replace(":", " ").replace(",", " ").split():
            if word.startswith("--") and "export" not in advice:
                assert word in shown, advice


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ConfigError, match="trainer: learning_rat is not an argument of transformers' TrainingArguments"
    ):
        TrainOptions(**NEEDED, trainer={"learning_rat": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "trainer"),
        ("true", "trainer"),
        ("0", "trainer"),
        ("{max_steps: 3}", "max_steps is refused: use --steps"),
    ],
)
def test_wrong_entries_of_a_file_are_refused_before_anything_is_opened(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(f"trainer: {content}\n")
    words = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]
    with pytest.raises((click.ClickException, ConfigError), match=message):
        main(["train", "--config", str(tmp_path / "c.yaml"), *words], standalone_mode=False)
    assert not (tmp_path / "o").exists()


def test_an_empty_heading_holds_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("trainer:\n")
    words = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]
    with pytest.raises((click.ClickException, ConfigError), match="no checkpoint at s"):
        main(["train", "--config", str(tmp_path / "c.yaml"), *words], standalone_mode=False)


def test_what_is_allowed_reaches_the_trainer(options):
    from dataclasses import replace

    from switchkd.pipelines.training.arguments import training_arguments

    made = training_arguments(replace(options, trainer={"adam_beta2": 0.9, "optim": "adamw_torch"}))
    assert (made.adam_beta2, str(made.optim.value)) == (0.9, "adamw_torch")
