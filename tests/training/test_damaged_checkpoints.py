"""Checkpoints are verified before they are read: a run goes on from a sound one, or says that there is none."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import training
from training import Stop, assert_same_weights, history, interrupt_after, two_processes, weights

from switchkd.errors import CheckpointError, ReadFailure
from switchkd.pipelines.training.lifecycle import begun, sealed
from switchkd.pipelines.training.train import train

cached, options = training.cached, training.options


@pytest.fixture(scope="module")
def stopped(teacher, student, cached, tmp_path_factory):
    """A run that ended in step 6, with checkpoints of steps 2 and 4."""
    options = training.train_options(teacher, student, cached, tmp_path_factory.mktemp("stopped") / "run")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stop):
            train(options)
    assert [path.name for path in begun.checkpoints(options.output)] == ["checkpoint-4", "checkpoint-2"]
    return options.output


@pytest.fixture
def interrupted(options, stopped):
    """The options that resume a copy of that run."""
    shutil.copytree(stopped, options.output)
    return options


@pytest.fixture(scope="module")
def undisturbed(teacher, student, cached, tmp_path_factory):
    """The folder of the same run without an interruption."""
    whole = training.train_options(teacher, student, cached, tmp_path_factory.mktemp("whole") / "run")
    train(whole)
    return whole.output


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file):
    file.write_bytes(b"")


def flipped(file, where=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 1
    file.write_bytes(content)


def grown(file):
    file.write_bytes(file.read_bytes() + b"\0")


def replaced_by_folder(file):
    file.unlink()
    file.mkdir()


def dangling(file):
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES = (cut, emptied, flipped, grown, Path.unlink, replaced_by_folder, dangling)


def test_every_damage_of_every_file_is_noticed(interrupted):
    whole = interrupted.output / "checkpoint-4"
    assert sealed.damage_of(whole, sealed=True) is None
    files = [file.name for file in whole.iterdir()]
    assert {"model.safetensors", "optimizer.safetensors", "rng_0.json", "trainer_state.json", "files.json"} <= set(
        files
    )
    for name in files:
        for damage in DAMAGES:
            here = shutil.copytree(whole, interrupted.output / "copy")
            damage(here / name)
            assert sealed.damage_of(here, sealed=True) is not None, (name, damage)
            shutil.rmtree(here)


@pytest.mark.parametrize("where", (0, 0.1, 0.9, 0.999))
def test_a_single_bit_is_noticed_anywhere(interrupted, where):
    flipped(interrupted.output / "checkpoint-4/model.safetensors", where)
    assert (
        sealed.damage_of(interrupted.output / "checkpoint-4", sealed=True)
        == "model.safetensors has other bytes than were written"
    )


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "null",
        '{"trainer_state.json": 1}',
        '{"../x": [1, "a"], "trainer_state.json": [1, "a"]}',
        "{",
        "[" * 9999,
    ],
)
def test_a_list_of_files_that_is_wrong_is_a_damage(interrupted, content):
    (interrupted.output / "checkpoint-4/files.json").write_text(content)
    assert sealed.damage_of(interrupted.output / "checkpoint-4", sealed=True) == "files.json is damaged"


def test_tensors_that_were_not_written_are_a_damage(interrupted):
    folder = interrupted.output / "checkpoint-4"
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    assert sealed.damage_of(folder, sealed=True) == "model-2.safetensors was not written with it"


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", flipped), ("optimizer.safetensors", cut), ("rng_0.json", Path.unlink)]
)
def test_a_damaged_checkpoint_is_passed_over_by_name(interrupted, undisturbed, caplog, name, damage):
    """And the run ends as an undisturbed one; the damaged checkpoint is replaced when its step comes again."""
    damage(interrupted.output / "checkpoint-4" / name)
    with caplog.at_level(logging.WARNING, "switchkd"):
        train(interrupted)
    assert f"checkpoint-4 is damaged: {name} " in caplog.text or f"{name} is missing" in caplog.text
    assert "checkpoint-2: steps 3 to 4 are trained again" in caplog.text
    assert history(interrupted.output) == history(undisturbed)
    assert_same_weights(weights(interrupted.output), weights(undisturbed))
    assert [path.name for path in begun.checkpoints(interrupted.output)] == ["checkpoint-6", "checkpoint-4"]
    assert all(sealed.damage_of(path, sealed=True) is None for path in begun.checkpoints(interrupted.output))


def test_without_a_sound_checkpoint_the_run_is_refused(interrupted):
    for path in begun.checkpoints(interrupted.output):
        cut(path / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        train(interrupted)
    said = str(refused.value)
    assert "has no sound checkpoint to go on from" in said and "checkpoint-4 is damaged: model.safetensors has" in said
    assert "checkpoint-2 is damaged" in said and "Restore one of them from a copy. Or remove them all" in said


@pytest.mark.parametrize("number", (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENOMEM))
def test_a_failure_to_read_is_no_damage(interrupted, monkeypatch, number):
    """Nothing is passed over or trained again because a disk did not answer once."""

    def failing(file):
        raise OSError(number, os.strerror(number), str(file))

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "_digest", failing)
        with pytest.raises(ReadFailure, match=r"checkpoint-4 could not be read: .*Nothing says that it is damaged"):
            train(interrupted)
    assert sealed.newest_sound(interrupted.output, sealed=True).name == "checkpoint-4"


def as_before(run):
    """Make a run's folder that of an earlier version, whose checkpoints had no digests."""
    for path in begun.checkpoints(run):
        (path / "files.json").unlink()
    record = run / "run.yaml"
    record.write_text(record.read_text().replace("checkpoints_have_digests: true\n", ""))


@pytest.mark.parametrize("damage", (None, cut, emptied))
def test_checkpoints_of_earlier_versions_are_accepted_and_their_files_parsed(interrupted, caplog, damage):
    as_before(interrupted.output)
    if damage is not None:
        damage(interrupted.output / "checkpoint-4/optimizer.safetensors")
    train(interrupted)
    assert ("optimizer.safetensors is incomplete or damaged" in caplog.text) == (damage is not None)
    assert ("steps 3 to 4 are trained again" in caplog.text) == (damage is not None)


def test_a_first_checkpoint_that_an_earlier_version_did_not_finish_is_passed_over(interrupted, caplog):
    as_before(interrupted.output)
    shutil.rmtree(interrupted.output / "checkpoint-4")
    (interrupted.output / "checkpoint-2/trainer_state.json").unlink()
    assert sealed.newest_sound(interrupted.output, sealed=False) is None
    assert "Beginning at step 0" in caplog.text
    (interrupted.output / "run.yaml").write_text("checkpoints_have_digests: true\n")
    with pytest.raises(CheckpointError, match="files.json is missing"):
        sealed.newest_sound(interrupted.output, sealed=True)


@pytest.mark.parametrize("profile", ("ddp", pytest.param("fsdp", marks=pytest.mark.slow)))
def test_several_processes_write_and_choose_one_checkpoint(options, undisturbed, tmp_path, profile):
    """Each writes its random states into it; on resume the first one verifies for all."""
    run = tmp_path / "two"
    stop = (
        "from switchkd.pipelines.training.trainer import SwitchTrainer\nimport os\n"
        "step = SwitchTrainer.training_step\n"
        "def dying(self, *args, **kwargs):\n"
        "    if self.state.global_step == 5: os._exit(9)\n"
        "    return step(self, *args, **kwargs)\n"
        "SwitchTrainer.training_step = dying\n"
    )
    changed = {"batch_size": 2, "save_every": 2, "profile": profile}
    done = two_processes(options, tmp_path, prelude=stop, **changed)
    assert done.returncode == 1, done.stderr[-3000:]
    assert set(json.loads((run / "checkpoint-4/files.json").read_text())) >= {"rng_0.json", "rng_1.json"}
    assert not (run / ".unfinished").exists()
    flipped(run / "checkpoint-4/rng_1.safetensors")
    done = two_processes(options, tmp_path, **changed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-4 is damaged: rng_1.safetensors has other bytes" in done.stderr
    assert "steps 3 to 4 are trained again" in done.stderr
    training.assert_equal_runs(undisturbed, run)
    for path in begun.checkpoints(run):
        flipped(path / "model.safetensors")
    (run / "summary.json").unlink()
    done = two_processes(options, tmp_path, **changed)
    assert done.returncode == 1 and "has no sound checkpoint to go on from" in done.stderr, done.stderr[-3000:]
    assert 'Traceback (most recent call last):\n  File "<string>"' not in done.stderr


def test_what_was_not_committed_is_no_checkpoint(interrupted):
    """Left by a process that was killed while it wrote: removed by the next save, and never read."""
    shutil.copytree(interrupted.output / "checkpoint-4", interrupted.output / ".unfinished/checkpoint-6")
    train(interrupted)
    assert not (interrupted.output / ".unfinished").exists()


@pytest.mark.slow
def test_deepspeeds_checkpoints_have_digests_of_all_shards(options, tmp_path):
    pytest.importorskip("deepspeed", reason="--profile zero3 needs the extra deepspeed")
    done = two_processes(options, tmp_path, batch_size=1, accumulation=2, save_every=1, profile="zero3")
    assert done.returncode == 0, done.stderr[-3000:]
    newest = begun.checkpoints(tmp_path / "two")[0]
    listed = json.loads((newest / "files.json").read_text())
    assert sum(name.endswith(".pt") for name in listed) >= 2
    assert sealed.damage_of(newest, sealed=True) is None
