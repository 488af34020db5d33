"""Stage two: the loss that is minimised, refusals before the first step, and a resume that is exact."""

import json
import math
import os
import pickletools
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from switchkd.errors import CheckpointError, ConfigError, DataError, RunError, StoreError, StoreMismatch
from switchkd.losses import dbild_loss
from switchkd.pipelines import resume_state
from switchkd.pipelines.cache_teacher import CacheOptions, cache_teacher
from switchkd.pipelines.config import TrainOptions
from switchkd.pipelines.train import train
from switchkd.pipelines.trainer import SwitchTrainer


@pytest.fixture(scope="module")
def cached(teacher, tmp_path_factory):
    """A data file with a text-only and a two-turn row, and its store."""
    folder = tmp_path_factory.mktemp("cached")
    data = tiny.data(folder, tiny.rows(12, text_only=(3,), two_turns=(5,)))
    cache_teacher(
        CacheOptions(
            teacher=teacher,
            data=data,
            images=folder / "images",
            out=folder / "stores/s.zarr",
            template="qa",
            part_size=5,
            fine=1 / 4096,
            coarse=1 / 4096,
        )
    )
    return folder


@pytest.fixture
def options(teacher, student, cached, tmp_path):
    return TrainOptions(
        student=student,
        teacher=teacher,
        data=cached / "data.json",
        images=cached / "images",
        cache=cached / "stores",
        output=tmp_path / "run",
        steps=6,
        batch_size=4,
        lr=5e-3,
        log_every=1,
        save_every=2,
    )


def history(run):
    entries = json.loads((run / "summary.json").read_text())["history"]
    return [
        [entry[name] for name in ("step", "loss_ce", "loss_align", "loss_vsd")]
        for entry in entries
        if "loss_ce" in entry
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    """Bit for bit, or within a tolerance; a key bias has no gradient but rounding, which Adam blows up, and is left out then."""
    assert a.keys() == b.keys()
    for name in a:
        if tolerance and name.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_all_three_parts_are_logged_and_the_student_moves(options, student):
    done = train(options)
    assert done.steps == 6
    first, last = history(options.output)[0], history(options.output)[-1]
    assert all(value > 0 for value in first[1:])
    assert last[1] < first[1]
    before, after = (LlavaForConditionalGeneration.from_pretrained(f).state_dict() for f in (student, options.output))
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(not torch.equal(before[name], after[name]) for name in before if part in name), part


def test_the_trained_student_opens_anywhere(options):
    train(options)
    for folder in (options.output, options.output / "checkpoint-6"):
        _, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not set(report["missing_keys"]) - {"lm_head.weight"}
        assert not report["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
        assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["height"] == 16
    opened = [
        LlavaForConditionalGeneration.from_pretrained(f) for f in (options.output, options.output / "checkpoint-6")
    ]
    assert_same_weights(opened[0].state_dict(), opened[1].state_dict())


def test_nothing_that_is_written_is_a_pickle(options):
    train(options)
    for file in options.output.rglob("*"):
        if file.is_file():
            assert file.suffix in {".json", ".safetensors", ".yaml", ".jinja"}, file
            data = file.read_bytes()
            assert not data.startswith(b"PK"), file  # a torch archive
            with pytest.raises((ValueError, UnicodeDecodeError, IndexError)):
                list(pickletools.genops(data))


def test_a_finished_run_returns_at_once(options):
    first, again = train(options), train(options)
    assert not first.already_finished
    assert again.already_finished
    assert again.losses == first.losses


def test_other_options_for_the_same_output_are_refused(options):
    train(options)
    with pytest.raises(ConfigError, match=r"begun with other options:\n  lr: run 0.005, now 0.1"):
        train(replace(options, lr=0.1, log_every=3))


class Stop(Exception):
    pass


def interrupt_after(monkeypatch, steps):
    """Make the trainer fail in step `steps` + 1."""
    original, seen = SwitchTrainer.compute_loss, []

    def counting(self, *args, **kwargs):
        seen.append(1)
        if len(seen) > steps:
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "compute_loss", counting)


def test_a_resumed_run_equals_an_undisturbed_one(options, monkeypatch, tmp_path):
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stop):
            train(options)
    assert (options.output / "checkpoint-4").is_dir()
    # A checkpoint that was being written when the process died is passed over.
    torn = shutil.copytree(options.output / "checkpoint-4", options.output / "checkpoint-5")
    (torn / "trainer_state.json").write_text("{")
    train(options)
    assert history(options.output) == history(whole.output)
    assert_same_weights(weights(options.output), weights(whole.output))
    assert_same_weights(
        load_file(options.output / "checkpoint-6/optimizer.safetensors"),
        load_file(whole.output / "checkpoint-6/optimizer.safetensors"),
    )


RUN = "from switchkd.cli.main import main; main()"


def flags_of(options, **changed):
    """The command line of some options."""
    words = {"student": options.student, "teacher": options.teacher, "data": options.data, "images": options.images}
    words |= {"cache": options.cache, "output": options.output, "steps": 6, "batch_size": 4, "lr": 5e-3}
    words |= {"log_every": 1, "save_every": 2} | changed
    return [text for name, value in words.items() for text in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.parametrize("signal_sent", (signal.SIGINT, signal.SIGTERM))
def test_interrupted_training_says_how_to_go_on(options, signal_sent):
    """Ctrl-C, or a scheduler that takes the machine back."""
    command = [sys.executable, "-c", RUN, "train", *flags_of(options, steps=100_000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and resume_state.last_checkpoint(options.output) is None:
        time.sleep(0.05)
    process.send_signal(signal_sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert errors.splitlines()[-1] == "Error: interrupted; run the same command again to go on where it stopped"
    assert "Traceback" not in errors


def test_killed_training_goes_on(options, tmp_path):
    """SIGKILL in the middle of a real process, then the same command."""
    whole = replace(options, output=tmp_path / "whole", steps=8)
    train(whole)
    flags = flags_of(options, steps=8)
    kill = (
        "import os, signal\n"
        "from switchkd.pipelines import resume_state\n"
        "save = resume_state.save\n"
        "def dying(folder, *rest):\n"
        "    if folder.name == 'checkpoint-6': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(folder, *rest)\n"
        "resume_state.save = dying\n"
    )
    killed = subprocess.run([sys.executable, "-c", kill + RUN, "train", *flags], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert resume_state.last_checkpoint(options.output).name == "checkpoint-4"
    again = subprocess.run([sys.executable, "-c", RUN, "train", *flags], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "checkpoint-4" in again.stderr
    assert history(options.output) == history(whole.output)
    assert_same_weights(weights(options.output), weights(whole.output))


def test_a_checkpoint_without_a_weight_is_refused(options, monkeypatch):
    interrupt_after(monkeypatch, 5)
    with pytest.raises(Stop):
        train(options)
    file = options.output / "checkpoint-4/model.safetensors"
    found = weights(file.parent)
    gone = next(name for name in found if "down_proj" in name)
    from safetensors.torch import save_file

    save_file({name: tensor for name, tensor in found.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights, the first is .*down_proj"):
        train(options)


def test_gradient_accumulation_equals_one_large_batch(options, tmp_path):
    """The mean is over the positions of the whole accumulated batch, though micro-batches hold unequal numbers of them."""
    train(options)
    small = replace(options, output=tmp_path / "small", batch_size=2, accumulation=2)
    train(small)
    for a, b in zip(history(options.output), history(small.output), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_same_weights(weights(options.output), weights(small.output), rtol=1e-3, atol=1e-4)


def test_loader_workers_do_not_change_the_run(options, tmp_path):
    train(options)
    parallel = replace(options, output=tmp_path / "parallel", workers=2)
    train(parallel)
    assert history(options.output) == history(parallel.output)


@pytest.fixture(scope="module")
def hidden(teacher, cached, tmp_path_factory):
    """A store of the same data with payload `hidden`."""
    store = tmp_path_factory.mktemp("hidden") / "h.zarr"
    cache_teacher(
        CacheOptions(
            teacher=teacher,
            data=cached / "data.json",
            images=cached / "images",
            out=store,
            template="qa",
            payload="hidden",
        )
    )
    return store


@pytest.mark.parametrize("switch", (True, False))
def test_training_from_hidden_states_equals_the_live_teacher(options, hidden, tmp_path, switch):
    common = replace(options, steps=20, save_every=100, switch=switch)
    train(replace(common, cache=hidden))
    live = replace(common, cache=None, teacher_mode="live", template="qa", output=tmp_path / "live")
    train(live)
    for a, b in zip(history(options.output), history(live.output), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)  # states are stored in float16


def test_hidden_states_need_the_teachers_head(options, hidden):
    with pytest.raises(ConfigError, match=r"holds payload hidden, this run reads topk; pass --teacher"):
        train(replace(options, cache=hidden, teacher=None, switch=False))


def test_a_payload_that_is_not_there_is_refused(options, hidden):
    with pytest.raises(ConfigError, match="holds payload topk, this run reads hidden"):
        train(replace(options, payload="hidden"))


def test_live_needs_the_teacher_and_one_image_processor(options, student, tmp_path):
    with pytest.raises(ConfigError, match="--teacher-mode live runs the teacher: pass --teacher"):
        train(replace(options, teacher_mode="live", teacher=None, switch=False))
    folder = shutil.copytree(student, tmp_path / "other")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.4, 0.5, 0.5]}))
    with pytest.raises(CheckpointError, match="image processors of .* differ; cache the teacher instead"):
        train(replace(options, teacher_mode="live", student=folder))


def test_align_is_the_distance_to_the_live_teacher(options, student, teacher, cached):
    """The first logged Align of the cached run equals DBiLD against the teacher run live (k covers this vocabulary)."""
    from switchkd.encoding import SampleEncoder, collate
    from switchkd.positions import predicting_rows
    from switchkd.samples import SampleFile
    from switchkd.templates import TEMPLATES
    from switchkd.vlm import load_model, open_checkpoint

    train(replace(options, steps=1, batch_size=12))
    opened = open_checkpoint(student)
    encoder = SampleEncoder(opened, TEMPLATES["qa"], cached / "images", 128)
    batch = collate([encoder.encode(sample) for sample in SampleFile(cached / "data.json")], 0)
    rows, _ = predicting_rows(batch.pop("labels")), batch.pop("has_image")
    with torch.no_grad():
        of_student, of_teacher = (load_model(open_checkpoint(c))(**batch).logits[rows] for c in (student, teacher))
    expected = dbild_loss(of_student, of_teacher).item()
    assert history(options.output)[0][2] == pytest.approx(expected, rel=1e-2)


def test_a_student_with_the_teachers_own_eyes_is_told_so(options, teacher, tmp_path, caplog):
    own = LlavaForConditionalGeneration.from_pretrained(options.student)
    whole = LlavaForConditionalGeneration.from_pretrained(teacher)
    own.model.vision_tower.load_state_dict(whole.model.vision_tower.state_dict())
    folder = shutil.copytree(options.student, tmp_path / "eyes")
    own.save_pretrained(folder)
    with caplog.at_level("WARNING", logger="switchkd"):
        train(replace(options, steps=1))
        assert "VSD is" not in caplog.text
        # Every logit is in this store, in steps of 1/4096: the distance to it is rounding, squared.
        train(replace(options, steps=1, student=folder, output=tmp_path / "eyes-run"))
    assert caplog.text.count("the student sees as the teacher does") == 1


def test_samples_are_encoded_within_the_bounds_of_the_store(options, cached, tmp_path, monkeypatch):
    made = CacheOptions(
        teacher=options.teacher,
        data=options.data,
        images=options.images,
        out=tmp_path / "s.zarr",
        template="qa",
        max_length=77,
        max_image_pixels=1 << 30,
    )
    cache_teacher(made)
    used = []

    def stop(samples, encoder, *_):
        used.append((encoder.template.name, encoder.max_length, encoder.max_image_pixels))
        raise Stop

    monkeypatch.setattr("switchkd.pipelines.train.TrainingSamples", stop)
    with pytest.raises(Stop):
        train(replace(options, cache=made.out))
    assert used == [("qa", 77, 1 << 30)]


def test_sft_needs_no_teacher_and_skips_bad_samples(options, tmp_path):
    rows = tiny.rows(8)
    rows[2]["image"] = "nowhere.png"
    data = tiny.data(tmp_path / "sft", rows, images=False)
    for i in range(8):
        tiny.image(data.parent / f"images/{i:03d}.png", i)
    done = train(
        replace(
            options,
            objective="sft",
            switch=False,
            teacher=None,
            cache=None,
            template="qa",
            data=data,
            images=data.parent / "images",
        )
    )
    assert (done.samples, done.skipped) == (7, {"image_missing": 1})
    assert all(entry[2:] == [0, 0] for entry in history(options.output))


def test_align_alone_needs_no_teacher_weights(options):
    train(replace(options, switch=False, teacher=None))
    assert all(entry[2] > 0 and entry[3] == 0 for entry in history(options.output))


@pytest.mark.parametrize("objective", ("fkl", "rkl", "bild-fkl", "bild-rkl", "dbild-fkl"))
def test_every_objective_trains_with_the_switch(options, objective):
    train(replace(options, objective=objective, steps=2))
    assert all(value > 0 for entry in history(options.output) for value in entry[1:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": None}, ConfigError, "pass --teacher, or --no-switch"),
        ({"cache": None}, ConfigError, "reads a teacher store: pass --cache"),
        ({"template": "plain"}, StoreMismatch, "template name: store 'qa', here 'plain'"),
        ({"max_length": 99}, StoreMismatch, "maximum length: store 2048, here 99"),
        ({"window": 16}, ConfigError, "--window 16 looks beyond the 15 logits"),
        ({"precision": "fp8"}, ConfigError, "precision is float32 or bfloat16"),
        ({"trainer": {"no_such": 1}}, ConfigError, "training arguments: .*no_such"),
        ({"schedule": "zigzag"}, ConfigError, "training arguments: .*zigzag"),
    ],
)
def test_refused_before_the_first_step(options, change, error, message):
    with pytest.raises(error, match=message):
        train(replace(options, **change))
    assert not options.output.exists()


def test_the_store_of_another_teacher_is_refused(options, tmp_path):
    other = tiny.checkpoint(tmp_path / "other", seed=5, width=32)
    with pytest.raises(StoreMismatch, match=r"teacher projector: store .*\n.*teacher language: store"):
        train(replace(options, teacher=other))


def test_a_teacher_with_another_image_processor_is_refused(options, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "other")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.4, 0.5, 0.5]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(StoreMismatch, match="image processor: store"):
        train(replace(options, teacher=folder))


def test_an_unfinished_store_is_refused(options, cached, tmp_path):
    store = shutil.copytree(cached / "stores/s.zarr", tmp_path / "u.zarr")
    shutil.rmtree(store / "parts/00001")
    with pytest.raises(StoreError, match="holds 2 of 3 parts; run the same `switchkd cache-teacher` command again"):
        train(replace(options, cache=store))


def edited(cached, tmp_path):
    return shutil.copytree(cached, tmp_path / "edited")


def test_an_edited_word_is_refused_and_named(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    rows[4]["conversations"][1]["value"] = "circle"
    (folder / "data.json").write_text(json.dumps(rows))
    with pytest.raises(StoreMismatch, match=r"1 samples .* differ .*\n  row 4 \(id s4\): text\n"):
        train(replace(options, data=folder / "data.json"))


def test_exchanged_rows_are_refused_and_named(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    rows[0], rows[1] = rows[1], rows[0]
    (folder / "data.json").write_text(json.dumps(rows))
    with pytest.raises(StoreMismatch, match=r"row 0 \(id s1\): text and image\n  row 1 \(id s0\): text and image"):
        train(replace(options, data=folder / "data.json"))


def test_another_number_of_rows_is_refused(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(StoreMismatch, match="made from 12 samples, .* has 11"):
        train(replace(options, data=folder / "data.json"))


def test_a_data_file_that_only_looks_different_is_accepted(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(rows, indent=3))
    assert train(replace(options, data=folder / "data.json")).samples == 12


@pytest.mark.parametrize("workers", (0, 1))
def test_one_changed_pixel_is_refused_and_named(options, cached, tmp_path, workers):
    folder = edited(cached, tmp_path)
    file = folder / "images/007.png"
    picture = Image.open(file)
    red, green, blue = picture.getpixel((3, 3))
    picture.putpixel((3, 3), (red ^ 1, green, blue))
    picture.save(file)
    with pytest.raises(StoreMismatch, match=r"row 7 \(id s7\) .* its image changed since"):
        train(replace(options, images=folder / "images", workers=workers))


def test_an_image_that_vanished_is_named(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    (folder / "images/007.png").unlink()
    with pytest.raises(DataError, match=r"image_missing: row 7: no image .*007\.png; it was usable"):
        train(replace(options, images=folder / "images"))


def test_a_loss_that_is_not_finite_stops_the_run(options, monkeypatch):
    monkeypatch.setattr("switchkd.objective.Objective.total", lambda self, parts: parts.ce * math.nan)
    monkeypatch.setattr("switchkd.objective.Objective.distance", lambda self, logits, *_: logits.sum() * math.nan)
    with pytest.raises(RunError, match="the loss is nan at step 1"):
        train(options)


def test_a_full_disk_names_the_last_good_checkpoint(options, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    save = resume_state.save
    monkeypatch.setattr(resume_state, "save", lambda f, *rest: save(f, *rest) if f.name == "checkpoint-2" else full())
    with pytest.raises(RunError, match=r"No space left on device. The last good one: .*checkpoint-2; make room"):
        train(options)


def two_processes(options, tmp_path, **changed):
    """Train under torchrun with gloo; the run is in `tmp_path / "two"`."""
    flags = flags_of(options, output=tmp_path / "two", save_every=500, **changed)
    main = tmp_path / "main.py"
    main.write_text("from switchkd.cli.main import main\nif __name__ == '__main__':\n    main()\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(main), "train", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2), (1, 1)])
def test_two_processes_equal_one_with_the_same_global_batch(options, tmp_path, batch_size, accumulation):
    """torchrun with gloo: the division is by the positions of all processes; one sample at a time, a batch is text only."""
    steps = 12 // (2 * batch_size * accumulation)  # every sample once
    train(replace(options, steps=steps, batch_size=2 * batch_size * accumulation))
    done = two_processes(options, tmp_path, steps=steps, batch_size=batch_size, accumulation=accumulation)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(history(options.output), history(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_same_weights(weights(options.output), weights(tmp_path / "two"), rtol=1e-3, atol=1e-4)
