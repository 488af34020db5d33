"""What can be checked is checked before a sample is read, and nothing is recorded before: a corrected command is not refused."""

import math
import os
import sys
from dataclasses import replace

import pytest
import training
from training import history, interrupt_after

from switchkd.errors import ConfigError, RunError, SwitchKDError
from switchkd.pipelines.preflight import survey
from switchkd.pipelines.training import joining, model_setup
from switchkd.pipelines.training import train as train_module
from switchkd.pipelines.training.arguments import training_arguments
from switchkd.pipelines.training.inputs import resolve_options
from switchkd.pipelines.training.lifecycle import begun
from switchkd.pipelines.training.options import Schedule
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.pipelines.training.trainer_entries import ALLOWED

cached, options = training.cached, training.options
TEXTS = ("optim_target_modules", "adam_epsilon")  # a text or a list of them; a whole number or a fraction


@pytest.fixture
def untouched(monkeypatch):
    """Fail where a sample is inspected or read, or a model's weights are loaded."""

    def touched(*_, **__):
        pytest.fail("a sample or a model was read")

    monkeypatch.setattr(survey.SampleInspector, "inspect", touched)
    monkeypatch.setattr(joining, "TrainingSamples", touched)
    monkeypatch.setattr(model_setup, "load_model", touched)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"report_to": "no_such_logger"}}, "no_such_logger is not supported"),
        ({"trainer": {"report_to": ["none_such"]}}, "none_such"),
        ({"trainer": {"report_to": "tensorboard"}}, "trainer: report_to: TensorBoardCallback requires tensorboard"),
        ({"trainer": {"report_to": "comet_ml"}}, "trainer: report_to: .*comet"),
        ({"trainer": {"optim": "no_such"}}, "no_such"),
        ({"trainer": {"optim": "adamw_8bit"}}, "trainer: optim: .*bitsandbytes"),
        ({"trainer": {"optim_args": "nonsense"}}, "trainer: optim: "),
        ({"trainer": {"adam_beta1": 2.0}}, "trainer: optim: Invalid beta"),
        ({"trainer": {"adam_beta2": "much"}}, "trainer: adam_beta2 should be float, found 'much'"),
        ({"trainer": {"lr_scheduler_kwargs": {"no_such": 1}}}, "--schedule cosine with .*no_such"),
        ({"trainer": {"lr_scheduler_kwargs": [1]}}, "trainer: lr_scheduler_kwargs should be .*found"),
        ({"trainer": {"lr_scheduler_kwargs": {"num_cycles": "x"}}}, "--schedule cosine with .*num_cycles"),
        (
            {"schedule": "constant", "trainer": {"lr_scheduler_kwargs": {"a": 1}}},
            "--schedule constant takes no arguments",
        ),
        (
            {"schedule": "cosine_with_min_lr"},
            "--schedule cosine_with_min_lr with trainer: lr_scheduler_kwargs .*min_lr",
        ),
        ({"schedule": "warmup_stable_decay"}, "--schedule warmup_stable_decay with trainer: lr_scheduler_kwargs"),
        ({"schedule": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau requires an eval strategy"),
        ({"trainer": {"dataloader_persistent_workers": True}}, "persistent_workers option needs num_workers > 0"),
        ({"trainer": {"dataloader_prefetch_factor": 2}}, "prefetch_factor"),
        (
            {"workers": 1, "trainer": {"dataloader_multiprocessing_context": "no_such"}},
            "trainer: dataloader_…: .*no_such",
        ),
        ({"trainer": {"torch_compile": True, "torch_compile_backend": "no_such"}}, "torch_compile_…: .*no_such"),
        ({"trainer": {"torch_compile": True, "torch_compile_mode": "no_such"}}, "torch_compile_…: .*no_such"),
        ({"trainer": {"log_level": "loud"}}, "loud"),
        ({"trainer": {"debug": "no_such"}}, "no_such"),
    ],
)
def test_wrong_arguments_of_the_trainer_are_refused_first(options, untouched, monkeypatch, change, message):
    for module in ("tensorboard", "tensorboardX", "comet_ml"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message):
        train(replace(options, **change))
    assert not options.output.exists()


VALUES = [None, "x", "", -1, 0, 10**12, 0.5, math.nan, math.inf, True, False, [], [1], ["x"], {}, {"x": 1}]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_row_19_every_entry_with_every_kind_of_value(options, name):
    """Refused by name before anything is opened, or of the entry's own type."""
    taken = []
    for value in VALUES:
        try:
            training_arguments(replace(resolve_options(options), trainer={name: value}))
            taken.append(value)
        except ConfigError as error:
            told = str(error)
            assert "trainer" in told or name in told or "training arguments" in told, told
    assert len({type(value) for value in taken if value not in (None, "", [], {}, 0)}) <= 1 or name in TEXTS, taken


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"debug": True}, r"trainer: debug should be str | list\[.*\], found True"),
        ({"torch_empty_cache_steps": 0}, "trainer: torch_empty_cache_steps should be at least 1 and finite, found 0"),
        ({"adam_epsilon": math.nan}, "trainer: adam_epsilon should be at least 0 and finite, found nan"),
        ({"full_determinism": "yes"}, "trainer: full_determinism should be bool, found 'yes'"),
        (
            {"eval_strategy": "steps"},
            "trainer: eval_strategy is refused: use --eval-data, which evaluates a student while it trains",
        ),
        ({"fsdp": "full_shard"}, "trainer: fsdp is refused: use --profile fsdp"),
    ],
)
def test_row_19_an_entry_is_refused_before_anything_is_opened(options, untouched, entry, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(options, data=options.output / "none.json", student=options.output / "none", trainer=entry))


def test_every_schedule_trains_or_is_refused_first(options, untouched, monkeypatch):
    """Whether it needs arguments or not; `untouched` fails with another exception."""
    for name in Schedule.__args__:
        with pytest.raises((ConfigError, pytest.fail.Exception)) as end:
            train(replace(options, schedule=name))
        if isinstance(end.value, ConfigError):
            assert name in str(end.value), name


@pytest.mark.parametrize("stage", ["open_inputs", "set_up_models", "_make_trainer"])
def test_nothing_is_recorded_before_everything_was_checked(options, monkeypatch, stage):
    """Whatever is refused, and wherever: the corrected command trains, though it changes an option that is recorded."""

    def refuse(*_, **__):
        raise ConfigError("wrong")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, stage, refuse)
        with pytest.raises(ConfigError, match="wrong"):
            train(replace(options, lr=0.1))
    assert not (options.output / "run.yaml").exists()
    train(options)


def test_a_run_without_a_checkpoint_may_begin_anew_with_other_options(options, monkeypatch):
    """It failed in its first step, say from a lack of memory: there is nothing that the options could contradict."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        with pytest.raises(training.Stop):
            train(options)
    assert (options.output / "run.yaml").exists()
    changed = replace(options, lr=1e-3, batch_size=3, steps=4)
    train(changed)
    assert "lr: 0.001" in (options.output / "run.yaml").read_text()
    with pytest.raises(ConfigError, match="begun with other options:\n  lr"):
        train(replace(changed, lr=5e-3))


def test_a_run_with_a_checkpoint_may_not(options, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(training.Stop):
            train(options)
    with pytest.raises(ConfigError, match="begun with other options:\n  lr"):
        train(replace(options, lr=1e-3))


def test_the_losses_of_a_run_that_is_shorter_than_the_logging_interval_are_told(options):
    done = train(replace(options, steps=3, log_every=10))
    assert [entry[0] for entry in history(options.output)] == [3]
    assert set(done.losses) == {"loss", "loss_ce", "loss_align", "loss_vsd"}


def test_the_last_losses_are_those_of_the_end(options, tmp_path):
    """And each interval is logged once."""
    train(replace(options, steps=6, log_every=4))
    assert [entry[0] for entry in history(options.output)] == [4, 6]
    train(replace(options, steps=6, log_every=3, output=tmp_path / "other"))
    assert [entry[0] for entry in history(tmp_path / "other")] == [3, 6]


MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 3.2 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_a_lack_of_memory_in_a_step_says_what_helps_and_where_the_run_goes_on(options, monkeypatch, error):
    original = SwitchTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise error
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SwitchTrainer, "compute_loss", compute_loss)
        with pytest.raises(
            RunError, match=r"out of memory: lower --batch-size .*\nThe last good checkpoint: .*checkpoint-4"
        ):
            train(options)
    train(options)


@pytest.mark.parametrize("finished", (False, True))
@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # tokenizers
        OSError(28, os.strerror(28)),
        OSError(122, os.strerror(122)),
    ],
    ids=repr,
)
def test_a_full_disk_under_the_tokenizer(options, monkeypatch, error, finished):
    """While a checkpoint is saved, or the finished student."""
    from transformers import PreTrainedTokenizerBase

    original = PreTrainedTokenizerBase.save_pretrained

    def save_pretrained(self, folder, *args, **kwargs):
        if (str(folder) == str(options.output)) if finished else "checkpoint-4" in str(folder):
            raise error
        return original(self, folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)
        with pytest.raises(SwitchKDError, match=r"The last good checkpoint: .*checkpoint-\d") as stop:
            train(options)
    assert stop.value.exit_code == 1
    assert not (options.output / ".unfinished").exists()
    assert begun.checkpoints(options.output)[0].name == ("checkpoint-6" if finished else "checkpoint-2")
    train(options)
