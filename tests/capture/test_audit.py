"""`store audit`: a store of the very teacher is at rounding distance, a poor one is seen."""

from dataclasses import replace

import pytest
import tiny

from switchkd.cli.main import main
from switchkd.errors import StoreMismatch
from switchkd.pipelines.capture.audit import audit
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import AuditOptions, CacheOptions

WORDS = [*tiny.WORDS, *(f"w{i}" for i in range(185))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher with a vocabulary of 200, its data, and a store of both payloads, k = 20."""
    folder = tmp_path_factory.mktemp("audit")
    tiny.checkpoint(folder / "teacher", 0, words=WORDS)
    tiny.checkpoint(folder / "student", 1, width=16, layers=1, words=WORDS)
    tiny.data(folder / "data", tiny.rows(10, text_only=(3,)))
    cache_teacher(cache(folder))
    return folder


def cache(folder, **changed):
    options = CacheOptions(
        teacher=folder / "teacher",
        data=folder / "data/data.json",
        images=folder / "data/images",
        out=folder / "s.zarr",
        template="qa",
        payload="both",
        k=20,
        part_size=4,
    )
    return replace(options, **changed)


def options(folder, **changed):
    of = AuditOptions(folder / "s.zarr", folder / "teacher", folder / "data/data.json", folder / "data/images")
    return replace(of, **changed)


def test_hidden_states_are_nearly_exact_and_top_k_is_not(place):
    topk, hidden, control = audit(options(place)).rows
    assert hidden.gradient_error < 0.01 < topk.gradient_error
    assert hidden.kl_nats < 1e-6 < topk.kl_nats
    assert hidden.student_led_recall == 1.0
    assert topk.student_led_recall < 1.0
    assert topk.largest_logit_error <= 1 / 16 + 1e-4  # half the coarse step
    assert control.gradient_error < 1e-3
    assert control.kl_nats < 1e-8


def test_a_student_can_be_given(place):
    with_student = audit(options(place, student=place / "student"))
    assert with_student.student.endswith("student")
    assert with_student.rows[1].gradient_error < 0.01


def test_a_coarser_store_is_further_away(place, tmp_path):
    coarse = tmp_path / "c.zarr"
    cache_teacher(cache(place, out=coarse, payload="hidden", hidden_dtype="int8"))
    assert audit(options(place, store=coarse)).rows[0].kl_nats > audit(options(place)).rows[1].kl_nats


def test_the_choice_of_samples_is_random_and_reproducible(place):
    one, again, other = (audit(options(place, samples=3, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one.positions == 6
    assert one.rows != other.rows


def test_another_teacher_is_refused(place, tmp_path):
    other = tiny.checkpoint(tmp_path / "other", 7, words=WORDS)
    with pytest.raises(StoreMismatch, match="teacher language: store"):
        audit(options(place, teacher=other))


def test_the_command_prints_a_table(place):
    from click.testing import CliRunner

    words = ["store", "audit", place / "s.zarr", "--teacher", place / "teacher", "--data", place / "data/data.json"]
    done = CliRunner().invoke(main, [*map(str, words), "--images", str(place / "data/images"), "-n", "4"])
    assert done.exit_code == 0, done.output
    for text in ("4 random samples, 8 positions", "topk, k = 20", "hidden, float16", "control: teacher against itself"):
        assert text in done.stdout
