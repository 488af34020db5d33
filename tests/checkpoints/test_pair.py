"""Row 10: a student that cannot learn from the teacher of a later stage is refused before anything is paid for, with the cure."""

import components
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.pair import check_pair
from switchkd.pipelines.checkpoints import init_student as init_module
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.stages import with_stage
from switchkd.pipelines.training.train import train

MORE = [*tiny.WORDS, "purple"]
OTHERS = ["<pad>", "<eos>", "<image>", "<unk>", *reversed(tiny.WORDS[4:])]


def llava(folder, seed=3, width=16, strategy="full", size=16, **options):
    vision = tiny.vision_config("siglip", width=width, size=size)
    return tiny.checkpoint(folder, seed, vision=vision, strategy=strategy, **options)


# (teacher, student, the message, the cure). The first is a converted TinyLLaVA, which drops one of SigLIP's 729 features.
PAIRS = {
    "a feature less": ({"strategy": "default"}, {}, "an image becomes 3 tokens for the teacher and 4", "--strategy default"),
    "a feature more": ({}, {"strategy": "default"}, "an image becomes 4 tokens for the teacher and 3", "--strategy full"),
    "other patches": ({"size": 32}, {}, "an image becomes 16 tokens for the teacher and 4", "a tower of 16 patches"),
    "another width": ({"width": 32}, {}, r"\(width 16\) to the teacher's projector \(width 32\)", "a tower of width 32"),
    "pooled": ({"size": 32, "grid": 2}, {"size": 32}, "becomes 4 tokens for the teacher and 16", "--projector ldpv2 --grid 2"),
    "not pooled": ({"size": 32}, {"size": 32, "grid": 2}, "becomes 16 tokens for the teacher and 4", "--projector mlp"),
    "pooled from others": ({"size": 32, "grid": 2}, {}, "feeds the student's 4 vision features .* takes 16", "tower of 16 patches"),
    "more words": ({"words": MORE}, {}, r"the tokenizers differ \(16 and 15 entries\)", "--tokenizer"),
    "other ids": ({"words": OTHERS}, {}, "the tokenizers differ", "--vocab-map, and leave --teacher out"),
    "fewer rows": ({}, {"rows": 12}, "embedding has 12 of the 15 rows", "make the student anew"),
}  # fmt: skip


@pytest.fixture(params=PAIRS)
def pair(request, tmp_path):
    teacher, student, message, cure = PAIRS[request.param]
    return llava(tmp_path / "teacher", **teacher), llava(tmp_path / "student", **student), message, cure


def test_row_10_pre_training_refuses_the_pair_first(pair, tmp_path):
    """The data file does not even exist."""
    teacher, student, message, cure = pair
    data, output = tmp_path / "none.json", tmp_path / "run"
    with pytest.raises(CheckpointError, match=message) as caught:
        train(
            TrainOptions(**with_stage("pt", {"student": student, "data": data, "output": output, "teacher": teacher}))
        )
    said, _, advice = str(caught.value).partition("The cure: ")
    assert str(teacher) in said and str(student) in said and cure in advice
    assert not (output / "run.yaml").exists()


def test_a_pair_that_fits_pre_trains_as_without_a_teacher(teacher, student, tmp_path):
    data = tiny.data(tmp_path / "data", tiny.rows(4))
    given = {"student": student, "data": data, "images": data.parent / "images", "batch_size": 2, "global_batch": 2}
    done = [
        train(TrainOptions(**with_stage("pt", given | {"output": tmp_path / f"run{number}", **more})))
        for number, more in enumerate(({}, {"teacher": teacher}))
    ]
    assert done[0].losses == done[1].losses


INIT = {
    "a feature less": ({"strategy": "default"}, {}, {"strategy": "default"}),
    "other patches": ({"size": 32}, {}, {"size": 32}),
    "another width": ({"width": 32}, {}, None),
    "pooled": ({"size": 32, "grid": 2}, {"size": 32}, {"size": 32, "projector": "ldpv2", "grid": 2}),
    "more words": ({"words": MORE}, {"tokenizer": None}, {}),
    "fits": ({}, {}, {}),
}


@pytest.mark.parametrize("kind", INIT)
def test_row_10_init_student_refuses_the_pair_before_a_weight_is_read(tmp_path, monkeypatch, kind):
    """And what the cure says makes a student that fits."""
    of_teacher, given, cured = INIT[kind]
    teacher = llava(tmp_path / "teacher", **of_teacher)

    def run(size=16, **options):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        vision = components.tower(tmp_path / f"tower{size}", size=size)
        language = components.language(tmp_path / "language", words=tiny.WORDS)
        flags = {
            "vision": vision,
            "language": language,
            "out": out,
            "image_mode": "square",
            "teacher": teacher,
            "tokenizer": teacher,
        } | options
        given = {name.replace("_", "-"): str(value) for name, value in flags.items() if value is not None}
        text = [word for name, value in given.items() for word in (f"--{name}", value)]
        return out, CliRunner().invoke(main, ["init-student", *text])

    if kind != "fits":
        with monkeypatch.context() as patch:
            patch.setattr(init_module, "_load_language", lambda *_: pytest.fail("weights were read"))
            out, done = run(**given)
        assert done.exit_code == 2 and "The cure: " in done.output, done.output
        assert not out.exists()
    if cured is not None:
        out, done = run(**cured)
        assert done.exit_code == 0, done.output
        check_pair(open_checkpoint(teacher), open_checkpoint(out))


def test_a_teacher_that_is_none(tmp_path):
    words = ["--vision", components.tower(tmp_path / "tower"), "--language", components.language(tmp_path / "language")]
    done = CliRunner().invoke(
        main, ["init-student", *map(str, words), "--out", str(tmp_path / "out"), "--teacher", str(tmp_path / "none")]
    )
    assert done.exit_code == 2 and "no checkpoint at" in done.output
