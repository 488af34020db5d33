"""Every write, sync and rename of a small run fails once: the run ends with a clear error, and one rerun has equal weights."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import training
from safetensors import SafetensorError
from training import assert_same_weights, history, weights
from transformers import PreTrainedTokenizerBase

from switchkd.errors import RunError, SwitchKDError
from switchkd.pipelines.training.lifecycle import begun, sealed
from switchkd.pipelines.training.train import train

cached = training.cached
SAMPLED = 5  # operations that the normal suite lets fail, with each error; all of them with `make test-faults`


class Killed(BaseException):
    """Ends a run where a signal would: nothing of its own handles it."""


class Faults:
    """Counts operations below a folder, and lets the n-th of them fail as a full disk does, or as a killed process.

    Opening for writing, renaming, removing and making folders are seen by an audit hook, syncs and the writers of libraries by
    patches. A writer that fails leaves half of its file.
    """

    folder, fail_at, error, count, hooked = None, None, None, 0, False
    names: list[str]

    def begin(self, folder, fail_at=None, error=None):
        self.folder, self.fail_at, self.error, self.count, self.names = str(folder), fail_at, error, 0, []
        if not self.hooked:
            sys.addaudithook(self.seen)  # cannot be removed; without a folder it does nothing
            type(self).hooked = True

    def end(self):
        self.folder = None
        return self.count

    def seen(self, event, arguments):
        if self.folder is None or event not in {"open", "os.rename", "os.mkdir"}:
            return
        path = arguments[0]
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.folder):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.operation(f"{event} {Path(path).name}")

    def operation(self, name):
        self.count += 1
        self.names.append(name)
        if self.count == self.fail_at:
            raise self.error(name)


FAULTS = Faults()


def full(name):
    return OSError(28, f"{os.strerror(28)} ({name})")


@pytest.fixture
def faults(monkeypatch):
    fsync, serialize, save = os.fsync, safetensors.torch.serialize_file, PreTrainedTokenizerBase.save_pretrained

    def failing_fsync(handle):
        if FAULTS.folder is not None:
            FAULTS.operation("fsync")
        fsync(handle)

    def failing_serialize(tensors, file, *rest, **named):
        serialize(tensors, file, *rest, **named)
        if FAULTS.folder is not None:
            try:
                FAULTS.operation(f"safetensors {Path(file).name}")
            except OSError as error:
                os.truncate(file, Path(file).stat().st_size // 2)
                raise SafetensorError(f"Error while serializing: I/O error: {error}") from error
            except Killed:
                os.truncate(file, Path(file).stat().st_size // 2)
                raise

    def failing_save(self, *arguments, **named):
        if FAULTS.folder is not None:
            try:
                FAULTS.operation("tokenizer")
            except OSError as error:
                raise Exception(str(error)) from error  # as tokenizers does
        return save(self, *arguments, **named)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    monkeypatch.setattr(safetensors.torch, "serialize_file", failing_serialize)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", failing_save)
    yield FAULTS
    FAULTS.end()


@pytest.fixture(scope="module")
def short(teacher, student, cached, tmp_path_factory):
    """The options of a run of three steps, a checkpoint after each, so that the first one is rotated out."""
    return replace(
        training.train_options(teacher, student, cached, tmp_path_factory.mktemp("whole") / "run"),
        steps=3,
        save_every=1,
    )


@pytest.fixture(scope="module")
def undisturbed(short):
    train(short)
    return short.output


def run_with_fault(options, faults, number, error, undisturbed):
    """Run with the n-th operation failing, then once more; return the operation's name, None if there was none."""
    faults.begin(options.output, number, error)
    try:
        train(options)
        ended = None
    except (SwitchKDError, OSError, Killed) as end:
        ended = end
    finally:
        faults.end()
    name = faults.names[number - 1] if len(faults.names) >= number else None
    if name is None:
        assert ended is None, ended
        return None
    # What was swallowed must have done no harm: the run is then finished, and equal.
    if error is full and ended is not None:
        assert isinstance(ended, (SwitchKDError, OSError)), (name, ended)  # the command line has a message for both
        assert os.strerror(28) in str(ended), (name, ended)
    for checkpoint in begun.checkpoints(options.output):
        assert sealed.damage_of(checkpoint, sealed=True) is None, (name, checkpoint)
    train(options)
    assert history(options.output) == history(undisturbed), name
    assert_same_weights(weights(options.output), weights(undisturbed))
    assert {path.name for path in options.output.iterdir() if path.name.startswith(".")} == set(), name
    return name


def campaign(options, faults, numbers, error, undisturbed, folder):
    names = []
    for number in numbers:
        name = run_with_fault(replace(options, output=folder / f"{number}"), faults, number, error, undisturbed)
        if name is None:
            break
        names.append(name)
    return names


def operations(options, faults, folder):
    """The number of operations of one run, and their names."""
    faults.begin(folder / "counted")
    train(replace(options, output=folder / "counted"))
    return faults.end(), faults.names


def test_some_operations_fail(short, undisturbed, faults, tmp_path):
    """A sample of all kinds of operations, with a full disk and with a killed process in turn."""
    count, names = operations(short, faults, tmp_path)
    assert count > 60, names
    step = max(1, count // SAMPLED)
    for error, begin in ((full, 1), (Killed, 1 + step // 2)):
        numbers = range(begin, count + 1, step)
        assert len(campaign(short, faults, numbers, error, undisturbed, tmp_path / error.__name__)) == len(numbers)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("error", (full, Killed))
@pytest.mark.parametrize("part", range(4))
def test_every_operation_fails_once(short, undisturbed, faults, tmp_path, error, part):
    count, _ = operations(short, faults, tmp_path)
    numbers = range(1 + part, count + 1, 4)
    assert len(campaign(short, faults, numbers, error, undisturbed, tmp_path / "runs")) == len(numbers)


@pytest.mark.parametrize("which", ("checkpoint-2", "finished"))
def test_a_full_disk_is_told_with_what_to_do(short, faults, tmp_path, which):
    """In the n-th write of the second checkpoint, and of the finished student."""
    _, names = operations(short, faults, tmp_path)
    found = [number + 1 for number, name in enumerate(names) if name.startswith("safetensors model")]
    options = replace(short, output=tmp_path / "run")
    faults.begin(options.output, found[1] if which == "checkpoint-2" else found[-1], full)
    with pytest.raises(
        RunError, match=r"No space left on device.*Make room\nThe last good checkpoint: .*checkpoint-\d\. The same"
    ):
        train(options)
    faults.end()
    assert sealed.last_checkpoint(options.output).name == (
        "checkpoint-1" if which == "checkpoint-2" else "checkpoint-3"
    )
