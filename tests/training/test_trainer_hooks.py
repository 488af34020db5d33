"""The private methods of transformers' Trainer that are overridden: each is there, takes what ours takes, and is still called."""

import inspect

import pytest
import transformers
from transformers import Trainer

from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.pipelines.training.trainer_hooks import OVERRIDDEN, CheckpointHooks


def parameters(function):
    return tuple(inspect.signature(function).parameters)[1:]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_installed_trainer_has_the_method_as_we_override_it(name):
    release = f"transformers {transformers.__version__}"
    theirs = getattr(Trainer, name, None)
    assert theirs is not None, f"{release} has no Trainer.{name}: move what CheckpointHooks.{name} does"
    assert parameters(theirs) == OVERRIDDEN[name], (
        f"{release} calls Trainer.{name}{inspect.signature(theirs)}: adapt CheckpointHooks.{name}"
    )
    assert parameters(getattr(CheckpointHooks, name)) == OVERRIDDEN[name]
    assert f"self.{name}(" in inspect.getsource(Trainer), f"{release} no longer calls Trainer.{name}"


def test_no_other_private_method_of_the_trainer_is_overridden():
    ours = {
        name
        for kind in inspect.getmro(SwitchTrainer)[: inspect.getmro(SwitchTrainer).index(Trainer)]
        for name in vars(kind)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert ours == set(OVERRIDDEN)
