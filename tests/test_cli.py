"""The command line as its users meet it: real commands, messages, exit codes, never a traceback."""

import json
import shutil

import pytest
import tiny
import yaml
from click.testing import CliRunner

from switchkd.cli.common import default_device
from switchkd.cli.main import COMMANDS, main


@pytest.fixture
def place(teacher, student, tmp_path):
    """A folder with a teacher, a student and a data file, as a user has them."""
    shutil.copytree(teacher, tmp_path / "teacher")
    shutil.copytree(student, tmp_path / "student")
    tiny.data(tmp_path / "data", tiny.rows(6, text_only=(1,)))
    return tmp_path


def run(place, *words):
    arguments = [str(word).replace("@", f"{place}/") for word in words]
    return CliRunner().invoke(main, arguments)


def cache(place, *more):
    words = ("cache-teacher", "--teacher", "@teacher", "--data", "@data/data.json", "--images", "@data/images")
    return run(place, *words, "--out", "@stores/t.zarr", "--template", "qa", "--part-size", 4, *more)


def train(place, *more):
    words = (
        "train",
        "--teacher",
        "@teacher",
        "--student",
        "@student",
        "--data",
        "@data/data.json",
        "--images",
        "@data/images",
    )
    return run(place, *words, "--cache", "@stores", "--output", "@run", "--steps", 2, "--batch-size", 3, *more)


def evaluation(place, *more):
    words = ("eval", "--model", "@teacher", "--data", "@data/data.json", "--images", "@data/images", "--output", "@out")
    return run(place, *words, "--template", "qa", *more)


def test_the_whole_way(place):
    cached = cache(place)
    assert cached.exit_code == 0, cached.output
    assert "2 parts written, 0 there before, 0 left to other workers" in cached.stdout
    assert "6 samples, 12 positions, 0.000 GB; skipped: none" in cached.stdout
    trained = train(place)
    assert trained.exit_code == 0, trained.output
    assert "trained for 2 steps on 6 samples; skipped: none" in trained.stdout
    judged = run(
        place,
        "eval",
        "--model",
        "@run",
        "--data",
        "@data/data.json",
        "--images",
        "@data/images",
        "--output",
        "@o",
        "--template",
        "qa",
    )
    assert judged.exit_code == 0, judged.output
    assert "over 6 questions; skipped: none" in judged.stdout


def test_store_info_tells_what_is_there(place):
    cache(place, "--shard", "0/2")
    told = run(place, "store", "info", "@stores")
    assert told.exit_code == 0
    assert "1 of 2  (unfinished: run cache-teacher again)" in told.output
    for text in (
        "samples     4 of 6",
        "positions   8",
        "topk: 15 of 15 logits, quantisation steps 0.004 to 0.125; hidden: 32 wide states as steps of logit error 0.02",
        "format      version 2, statistics of float32 logits",
        "knee        min",
        "bytes on disk",
        "qa",
    ):
        assert text in told.output


def test_store_info_counts_skips_by_reason(place):
    (place / "data/images/003.png").write_bytes(b"x")
    cache(place)
    assert "1 image_unreadable" in run(place, "store", "info", "@stores/t.zarr").output


def test_options_come_from_a_file_and_the_command_line_wins(place):
    cache(place)
    (place / "t.yaml").write_text(yaml.safe_dump({"lr": 0.5, "batch-size": 2, "trainer": {"adam_beta2": 0.95}}))
    done = train(place, "--config", "@t.yaml", "--lr", 0.25)
    assert done.exit_code == 0, done.output
    used = yaml.safe_load((place / "run/run.yaml").read_text())
    assert (used["lr"], used["batch_size"], used["trainer"]) == (0.25, 3, {"adam_beta2": 0.95})


MISTAKES = {
    "no such teacher": (lambda p: cache(p, "--teacher", "@nowhere"), "no checkpoint at", 2),
    "no such data": (lambda p: cache(p, "--data", "@nowhere.json"), "no data file", 2),
    "no such images": (lambda p: cache(p, "--images", "@nowhere"), "no image folder", 2),
    "no such template": (
        lambda p: cache(p, "--template", "poem"),
        "no template 'poem': pass one of plain, qwen2_base",
        2,
    ),
    "bad shard": (lambda p: cache(p, "--shard", "3/2"), "a shard is I/N", 2),
    "bad device": (lambda p: cache(p, "--device", "abacus"), "device 'abacus' cannot be used", 2),
    "k of one": (lambda p: cache(p, "--k", 1), "--k", 2),
    "no store": (lambda p: train(p), "no teacher store at", 2),
    "sft with switch": (lambda p: train(p, "--objective", "sft"), "pass --no-switch", 2),
    "unknown option": (lambda p: train(p, "--turbo"), "No such option", 2),
    "unknown command": (lambda p: run(p, "distill"), "No such command", 2),
    "no config": (lambda p: train(p, "--config", "@nowhere.yaml"), "nowhere.yaml", 2),
    "no such model": (lambda p: evaluation(p, "--model", "@nowhere"), "no checkpoint at", 2),
    "no such store": (lambda p: run(p, "store", "info", "@nowhere"), "no teacher store at", 2),
    "not a store": (lambda p: run(p, "store", "info", "@teacher"), "no teacher store at", 2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_message_and_exit_code(place, mistake):
    make, message, code = MISTAKES[mistake]
    done = make(place)
    assert done.exit_code == code, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("content", "message"),
    [("lr: [", "t.yaml"), ("- lr", "should hold options by name, found list"), ("speed: 9", "unknown options speed")],
)
def test_a_config_file_that_cannot_be_used(place, content, message):
    (place / "t.yaml").write_text(content)
    done = train(place, "--config", "@t.yaml")
    assert done.exit_code == 2
    assert message in done.output


def test_strict_stops_with_the_row(place):
    (place / "data/images/003.png").unlink()
    done = cache(place, "--strict")
    assert done.exit_code == 2
    assert "image_missing: row 3" in done.output


def test_a_full_disk_is_a_failed_run(place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("switchkd.stores.storage.local.LocalStorage.commit_part", full)
        done = cache(place)
    assert done.exit_code == 1
    assert "No space left on device. What was written so far, 0 parts, is whole" in done.output
    assert "Traceback" not in done.output
    assert "2 parts written" in cache(place).output


@pytest.mark.parametrize("workers", (0, 1))
def test_a_changed_image_is_told_in_one_line(place, workers):
    cache(place)
    tiny.image(place / "data/images/002.png", 99)
    done = train(place, "--workers", workers)
    assert done.exit_code == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert error.startswith("Error: row 2 (id s2)")
    assert "its image changed since" in error
    assert "Traceback" not in done.output


def test_out_of_memory_advises(place, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(
        "switchkd.pipelines.capture.backends.transformers_backend.TransformersBackend.capture", exhausted
    )
    done = cache(place)
    assert done.exit_code == 1
    assert "out of memory: lower --batch-size" in done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(place, name):
    done = run(place, name, "--help")
    assert done.exit_code == 0
    assert COMMANDS[name][1] in " ".join(run(place, "--help").output.split())


def test_every_option_of_every_command_has_help():
    def undocumented(command):
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.help and not parameter.show_default:
                yield parameter.name
        for child in getattr(command, "commands", {}).values():
            yield from undocumented(child)

    for name in COMMANDS:
        assert not list(undocumented(main.get_command(None, name))), name


def test_the_scores_are_json(place):
    evaluation(place)
    assert json.loads((place / "out/scores.json").read_text())["questions"] == 6


@pytest.mark.parametrize(
    ("rank", "devices", "expected"), [(None, 8, "cuda"), ("0", 8, "cuda"), ("3", 8, "cuda:3"), ("3", 1, "cuda"), ("1", 0, "cpu")]
)  # fmt: skip
def test_each_process_of_torchrun_has_a_device_of_its_own(monkeypatch, rank, devices, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_device() == expected
