"""What a run tells: the plan, figures that are right, metrics that reach their observers, a plot."""

import builtins
import re
import time
from dataclasses import replace

import pytest
import tiny
import torch
import training
from click.testing import CliRunner
from training import logged, two_processes

from switchkd.cli.main import main
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.losses.selection import kneedle
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.switch import switch_states
from switchkd.models.vlm import load_model
from switchkd.pipelines.training import plot
from switchkd.pipelines.training.batches.collator import Collator
from switchkd.pipelines.training.batches.dataset import TrainingSamples
from switchkd.pipelines.training.cost_model import CostModel, Work
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import predicting_rows
from switchkd.stores import TeacherStore

cached, options = training.cached, training.options


@pytest.fixture
def whole_batch(options, cached):
    """The one batch of a run with all 12 samples in a step, and both models before training."""
    student, teacher = (open_checkpoint(path) for path in (options.student, options.teacher))
    encoder = SampleEncoder(student, TEMPLATES["qa"], options.images, 2048)
    samples = TrainingSamples(SampleFile(options.data), encoder, TeacherStore.open(cached / "stores"))
    batch = Collator(0, payload=samples.payload)([samples[i] for i in range(12)])
    return batch, load_model(student, dtype="float32"), load_model(teacher, dtype="float32")


def test_the_figures_of_a_step_are_right(options, whole_batch):
    train(replace(options, steps=1, batch_size=12))
    (entry,) = logged(options.output)
    batch, student, teacher = whole_batch
    rows, has_image, mask = predicting_rows(batch["labels"]), batch["has_image"], batch["attention_mask"]
    assert entry["padding_share"] == pytest.approx(1 - mask.sum().item() / mask.numel())
    assert entry["positions_per_second"] == pytest.approx(rows.sum().item() / entry["seconds"])
    assert entry["samples_per_second"] == pytest.approx(12 / entry["seconds"])
    assert 0 < entry["store_read_seconds"] < entry["wait_seconds"] < entry["seconds"]
    assert entry["wait_share"] == pytest.approx(entry["wait_seconds"] / entry["seconds"])
    assert entry["tflops_per_second"] > 0 and "mfu" not in entry
    # The store holds all 15 logits, and the batch has fewer positions than are looked at.
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        knees = kneedle(student(**inputs).logits[rows]).double()
    for who, expected in (("student", knees), ("teacher", batch["teacher_knee"].double())):
        assert entry[f"knee_{who}_mean"] == pytest.approx(expected.mean().item(), rel=0.05)
        assert entry[f"knee_{who}_p95"] == pytest.approx(expected.quantile(0.95).item(), rel=0.1)
    # VSD alone, a mean over all positions, by autograd
    objective = options.as_objective()
    features = tiny.vision_features(student, batch["pixel_values"])
    with_image = [batch[name][has_image] for name in ("input_ids", "attention_mask")]
    states = switch_states(teacher, features, *with_image, rows[has_image])
    from switchkd.pipelines.batch import Batch
    from switchkd.pipelines.stored_teacher import StoredTopK

    signal = StoredTopK(15, "student").signal(Batch.of(batch)).select(has_image.repeat_interleave(rows.sum(-1)))
    vsd = objective.divergence(teacher.lm_head(states), signal) / rows.sum()
    (gradient,) = torch.autograd.grad(vsd, features)
    assert entry["vsd_gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert entry["loss_vsd"] == pytest.approx(vsd.item(), rel=1e-4)


def test_figures_do_not_depend_on_how_a_step_is_divided(options, tmp_path):
    train(replace(options, steps=2, batch_size=4))
    done = two_processes(options, tmp_path, steps=2, batch_size=1, accumulation=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(logged(options.output), logged(tmp_path / "two"), strict=True):
        for name in ("vsd_gradient_norm", "knee_teacher_mean", "knee_student_mean", "grad_norm", "positions"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name
    assert "student: 27,088 of 27,152 parameters train" in done.stderr
    assert done.stderr.count("memory, estimated") == 1  # one process speaks


def test_mfu_is_told_over_the_peak_that_is_given(options):
    train(replace(options, steps=1, peak_tflops=0.5))
    (entry,) = logged(options.output)
    assert entry["mfu"] == pytest.approx(entry["tflops_per_second"] / 0.5)


def test_a_slow_store_shows_as_waiting(options, monkeypatch):
    read = TeacherStore.payload

    def slow(self, indices):
        time.sleep(0.02 * len(indices))
        return read(self, indices)

    monkeypatch.setattr(TeacherStore, "payload", slow)
    train(replace(options, steps=2))
    for entry in logged(options.output):
        assert entry["store_read_seconds"] >= 4 * 0.02
        assert entry["wait_seconds"] >= entry["store_read_seconds"]


def test_without_a_knee_or_a_switch_there_is_no_figure_for_it(options):
    train(replace(options, steps=1, objective="fkl", switch=False))
    (entry,) = logged(options.output)
    assert not {"knee_student_mean", "vsd_gradient_norm"} & entry.keys()


@pytest.mark.parametrize(
    ("changed", "terms", "of_pathway"),
    [
        ({"objective": "sft", "switch": False, "cache": None, "teacher": None, "template": "qa"}, "ce", None),
        ({"objective": "fkl", "switch": False}, "ce align", None),
        ({}, "ce align vsd", "VSD"),
        ({"objective": "switch-ce", "cache": None, "template": "qa"}, "ce switch_ce", "the switch pathway's CE"),
    ],
)
def test_lines_name_the_terms_that_the_objective_has(options, capsys, changed, terms, of_pathway):
    run = replace(options, steps=1, **changed)
    train(run)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: 1/1")]
    found = re.search(r", loss [\d.]+ \(([^)]*)\), lr", line).group(1)
    assert re.sub(r" [\d.]+", "", found) == terms
    assert re.findall(r", of ([A-Za-z' ]+) [\d.e-]+,", line) == ([of_pathway] if of_pathway else [])
    # All columns stay in the log, and the command's last line is as the line above.
    (entry,) = logged(run.output)
    assert {"loss_ce", "loss_align"} <= entry.keys() and ({"loss_vsd", "loss_switch_ce"} & entry.keys())
    given = {name: value for name, value in changed.items() if name not in ("cache", "teacher")}
    dropped = {name: None for name in ("cache", "teacher") if name in changed}
    flags = training.flags_of(run, **{"steps": 1, **given, **dropped})
    done = CliRunner().invoke(main, ["train", *flags])
    assert done.exit_code == 0, done.output
    said = done.output.partition("last losses: ")[2].split(", ")
    assert [text.split()[0] for text in said] == ["loss", *terms.split()]


def test_the_plan_is_told_before_the_first_step(options, monkeypatch, caplog):
    def stop(self, **_):
        raise training.Stop

    monkeypatch.setattr(SwitchTrainer, "train", stop)
    with caplog.at_level("INFO", logger="switchkd"), pytest.raises(training.Stop):
        train(replace(options, train_parts="vision,projector"))
    said = " ".join(caplog.text.split())
    assert "objective dbild-rkl, switch True" in said and "global_batch 4" in said
    assert (
        "student: 24,192 of 27,152 parameters train (vision 23,392 of 23,456, projector 800 of 800, language 0 of"
        in said
    )
    assert "teacher: 0 of 23,424 parameters train (projector 0 of 2,112, language 0 of 21,312), float32" in said
    assert "steps: 6 of 4 samples: 1 process (ddp) x batch size 4 x accumulation 1" in said
    for kind in ("student", "gradients", "optimizer", "teacher", "activations", "loss"):
        assert f"{kind} 0." in said.partition("memory, estimated")[2], kind


def test_the_estimate_of_a_packed_run_counts_rows_and_their_mask(options, monkeypatch, caplog):
    def stop(self, **_):
        raise training.Stop

    monkeypatch.setattr(SwitchTrainer, "train", stop)
    for packing, said, masked in ((36, "2 x 34 tokens", False), (4, "4 x 17 tokens", True)):
        if masked:
            monkeypatch.setattr("switchkd.models.block_attention.is_plain", lambda config: False)
        with caplog.at_level("INFO", logger="switchkd"), pytest.raises(training.Stop):
            train(replace(options, packing=packing))
        told = " ".join(caplog.text.split()).partition("memory, estimated")[2]
        caplog.clear()
        assert said in told and ("mask 0." in told) == masked


@pytest.mark.parametrize("masked", (False, True))
def test_the_flops_of_a_packed_step_are_those_of_its_rows(options, whole_batch, monkeypatch, masked):
    if masked:
        monkeypatch.setattr("switchkd.models.block_attention.is_plain", lambda config: False)
    train(replace(options, steps=1, batch_size=12, packing=10_000))
    (entry,) = logged(options.output)
    batch, student, teacher = whole_batch
    lengths, on = batch["attention_mask"].sum(-1), batch["has_image"]
    positions = predicting_rows(batch["labels"]).sum(-1)
    counts = []
    for of, count in ((lengths, positions), (lengths[on], positions[on])):
        total = of.sum().item()
        counts.append((total, total**2 if masked else (of**2).sum().item(), count.sum().item()))
    (tokens, pairs, positions), (image_tokens, image_pairs, shown) = counts
    work = Work(tokens, pairs, on.sum().item(), image_tokens, image_pairs, positions, shown)
    expected = CostModel(student, teacher, None, 0, 4).flops(work)
    assert entry["tflops_per_second"] * entry["seconds"] * 1e12 == pytest.approx(expected, rel=1e-9)
    assert entry["padding_share"] == 0


def _the_plot_has_an_axis_for_each_scale(history, folder, monkeypatch):
    """Row 25 of the faults found by outside trials: CE and VSD shared an axis, and steps had ticks at 1.5."""
    from matplotlib import pyplot

    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        plot.plot_run(history, folder)
    (figure,) = drawn
    named = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes}
    assert named["Loss"] == ["loss", "ce"]
    assert named["Distance to the teacher"] == ["align", "vsd"]
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is None or not legend.get_window_extent().overlaps(axes.patch.get_window_extent())
    colours = [line.get_color() for axes in figure.axes for line in axes.lines]
    assert len(set(colours)) == len(colours) >= 5
    pyplot.close(figure)


def test_held_out_curves_have_their_terms_colours_and_the_title_names_the_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot needs the extra viz")
    from matplotlib import pyplot

    steps = {"learning_rate": 1e-3, "positions_per_second": 5.0}
    history = [{"step": i, "loss": 3.0, "loss_ce": 2.0 + i / 10, "loss_align": 0.02 + i / 100, **steps} for i in (1, 2)]
    history.append({"step": 2, "eval_loss_ce": 2.5, "eval_loss_align": 0.03, "eval_exact_match": 0.0})
    run = TrainOptions(student="s", data="d", output="runs/mine", switch=True, lora=4)
    title = plot.title_of(run, "hidden", {"a": {}, "b": {}})
    assert (
        title == "mine: dbild-rkl with the switch pathway, payload hidden, LoRA of rank 4 in language, mixture of a + b"
    )
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        plot.plot_run(history, tmp_path, f"{title} " * 20)
    (figure,) = drawn
    for name in ("ce", "align"):
        lines = [line for axes in figure.axes for line in axes.lines if line.get_label().startswith(name)]
        assert len(lines) == 2 and lines[0].get_color() == lines[1].get_color()
        assert lines[0].get_linestyle() != lines[1].get_linestyle()
    low, high = next(axes.get_ylim() for axes in figure.axes if axes.get_title() == "Loss")
    assert low > 1.9 and high < 3.2
    assert any(axes.get_title() == "Exact match, held out" for axes in figure.axes)
    figure.canvas.draw()
    assert figure._suptitle.get_text().count("\n") == 3
    heading = figure._suptitle.get_window_extent()
    assert heading.x0 >= 0 and heading.x1 <= figure.bbox.x1
    pyplot.close(figure)


def test_a_plot_is_drawn_at_the_end_or_one_line_says_why_not(options, tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib", reason="the plot needs the extra viz")
    train(replace(options, steps=2))
    assert (options.output / plot.PLOT).read_bytes().startswith(b"\x89PNG")
    _the_plot_has_an_axis_for_each_scale(logged(options.output), tmp_path, monkeypatch)
    importing = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level("INFO", logger="switchkd"):
        assert plot.plot_run(logged(options.output), tmp_path) is None
    assert "pip install 'switchkd[viz]'" in caplog.text
