"""`store audit`: a store of exact states is at rounding distance, a poor one is seen, what the dtype costs is told apart."""

from dataclasses import replace

import pytest
import reference
import tiny
import torch
from loss_cases import normal

from switchkd.cli.main import main
from switchkd.errors import StoreMismatch
from switchkd.losses.signals import DenseSignal, HiddenSignal, SparseSignal
from switchkd.pipelines.capture.audit import CONTROL, PRECISION, audit
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.fidelity import DISTANCES, Student, compare, make_students
from switchkd.pipelines.capture.options import AuditOptions, CacheOptions

WORDS = [*tiny.WORDS, *(f"w{i}" for i in range(185))]
TOPK, HIDDEN = "topk, k = 20, tail student", "hidden, float16"


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
        hidden_dtype="float16",
        k=20,
        part_size=4,
    )
    return replace(options, **changed)


def options(folder, **changed):
    of = AuditOptions(folder / "s.zarr", folder / "teacher", folder / "data/data.json", folder / "data/images")
    return replace(of, **changed)


def by_name(report):
    found = {}
    for row in report.rows:
        found.setdefault(row.name, []).append(row.fidelity)
    return found


def test_hidden_states_are_nearly_exact_and_top_k_is_not(place):
    report = audit(options(place))
    found = by_name(report)
    assert list(found) == [TOPK, HIDDEN, CONTROL]
    assert all(len(rows) == len(DISTANCES) for rows in found.values())
    for topk, hidden, control in zip(*found.values(), strict=True):
        assert hidden.gradient_error < 0.01 < topk.gradient_error
        assert hidden.state_gradient_error < 0.01 < topk.state_gradient_error
        assert hidden.kl_nats < 1e-6 < topk.kl_nats
        assert (hidden.student_led_recall, hidden.knee_moved) == (1.0, 0.0)  # the stored knee is the live one
        assert topk.student_led_recall < 1.0 and topk.teacher_led_recall < 1.0
        assert topk.largest_error <= 1 / 16 + 1e-4  # half the coarse step
        assert control.gradient_error < 1e-3 and control.kl_nats < 1e-8
    assert report.trained_from == HIDDEN
    errors = [row.gradient_error for row in found[HIDDEN]]
    assert report.gradient_error(HIDDEN) == pytest.approx(sum(errors) / 3)
    assert report.verdict.startswith(f"training from this store ({HIDDEN}) differs from the live teacher by 0.")
    assert "the teacher runs in float32" in report.verdict


def test_a_student_can_be_given(place):
    with_student = audit(options(place, student=place / "student"))
    assert {row.student for row in with_student.rows} == {str(place / "student")}
    assert by_name(with_student)[HIDDEN][0].gradient_error < 0.01


@pytest.mark.parametrize("error", (0.01, 0.1))
def test_a_coarser_store_is_further_away(place, tmp_path, error):
    """The error of a logit is what `--hidden-error` says, whatever the size of this teacher's logits."""
    coarse = tmp_path / "c.zarr"
    cache_teacher(cache(place, out=coarse, payload="hidden", hidden_dtype="steps", hidden_error=error))
    rows = by_name(audit(options(place, store=coarse)))[f"hidden, steps {error:g}"]
    for row in rows:
        assert row.rms_error == pytest.approx(error, rel=0.3)
        assert row.row_error < row.largest_error < 6 * error
        assert row.knee_moved == 0.0


def test_a_bfloat16_teacher_is_compared_with_float32_logits_and_with_itself_in_float32(place, tmp_path):
    """A store of exact states has no error beside the live teacher; what the dtype of the teacher costs is told apart."""
    store = tmp_path / "b.zarr"
    cache_teacher(cache(place, out=store, payload="hidden", hidden_dtype="bfloat16", dtype="bfloat16", batch_size=8))
    report = audit(options(place, store=store))
    found = by_name(report)
    assert list(found) == ["hidden, bfloat16", PRECISION, CONTROL]
    # Other batches than at capture round some states otherwise; the control says by how much.
    for stored, precision, control in zip(*found.values(), strict=True):
        assert stored.rms_error <= 2 * control.rms_error + 1e-5
        assert precision.rms_error > 1e-4
    assert f"the teacher's own precision (bfloat16) by {report.gradient_error(PRECISION):.2%}" in report.verdict
    without = audit(options(place, store=store, own_precision=False))
    assert PRECISION not in by_name(without)
    assert "the teacher's own precision was left out" in without.verdict


def test_the_choice_of_samples_is_random_and_reproducible(place):
    one, again, other = (audit(options(place, samples=3, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one.positions == 6
    assert one.rows != other.rows


def test_at_most_so_many_positions_are_compared(place):
    assert audit(options(place, positions=7)).positions == 7
    assert audit(options(place, positions=10_000)).positions == 20


def test_another_teacher_is_refused(place, tmp_path):
    other = tiny.checkpoint(tmp_path / "other", 7, words=WORDS)
    with pytest.raises(StoreMismatch, match="teacher language: store"):
        audit(options(place, teacher=other))


def test_the_command_prints_tables_and_a_verdict(place):
    from click.testing import CliRunner

    words = ["store", "audit", place / "s.zarr", "--teacher", place / "teacher", "--data", place / "data/data.json"]
    done = CliRunner().invoke(main, [*map(str, words), "--images", str(place / "data/images"), "-n", "4"])
    assert done.exit_code == 0, done.output
    for text in (
        "4 random samples, 8 positions",
        TOPK,
        HIDDEN,
        CONTROL,
        "student: near, KL 0.05",
        "student: far, KL 1.5",
    ):
        assert text in done.stdout
    assert done.stdout.splitlines()[-1].startswith("training from this store")


# What the figures mean


@pytest.fixture
def teacher():
    states, head = normal(1, 40, 16, dtype=torch.float32), normal(2, 120, 16, dtype=torch.float32)
    return states, head, states @ head.T


def test_students_stand_at_their_distances(teacher):
    _, head, exact = teacher
    for student, distance in zip(make_students(exact, head, seed=0), DISTANCES.values(), strict=True):
        found = torch.stack(
            [reference.kl(t.log_softmax(0), s.log_softmax(0)) for t, s in zip(exact, student.logits, strict=True)]
        )
        assert found.mean() == pytest.approx(distance, rel=0.01)


def test_the_scale_of_a_feature_does_not_change_a_student(teacher):
    """Four features × 300 with the head's columns / 300 are the same teacher: outlier features do not drown the others."""
    _, head, exact = teacher
    scale = torch.where(torch.arange(16) % 4 == 1, 2.0**8, 1.0)
    plain, scaled = (make_students(exact, weight, seed=0) for weight in (head, head / scale))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one.logits, other.logits)


def test_figures_of_a_comparison(teacher):
    """Each is counted again by loops."""
    states, head, exact = teacher
    student = Student("s", exact + normal(3, 40, 120, dtype=torch.float32), head)
    wrong = states + 0.05 * normal(4, 40, 16, dtype=torch.float32)
    knee = torch.tensor([reference.knee(row) for row in exact])
    knee[:5] = (knee[:5] + 3).clamp_max(120)
    found = compare(student, DenseSignal(exact), HiddenSignal(wrong, head, knee))
    rebuilt = wrong @ head.T
    error = rebuilt - exact
    error = error - error.mean(-1, keepdim=True)
    assert found.rms_error == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5)
    assert found.row_error == pytest.approx(float(error.abs().amax(-1).median()), rel=1e-5)
    assert found.largest_error == pytest.approx(float(error.abs().max()), rel=1e-5)
    assert found.knee_moved == pytest.approx(5 / 40)
    assert found.student_led_recall == 1.0
    hits = total = 0
    for row, (live, other) in enumerate(zip(exact, rebuilt, strict=True)):
        mine = set(reference.ranking(live)[: reference.knee(live)])
        hits += len(mine & set(reference.ranking(other)[: int(knee[row])]))
        total += len(mine)
    assert found.teacher_led_recall == pytest.approx(hits / total)
    kl = sum(reference.kl(a.log_softmax(0), b.log_softmax(0)) for a, b in zip(exact, rebuilt, strict=True)) / 40
    assert found.kl_nats == pytest.approx(float(kl), rel=1e-4)

    def gradient(teacher_rows, knees):
        s = student.logits.double().requires_grad_()
        total = 0
        for row, (mine, theirs) in enumerate(zip(s, teacher_rows.double(), strict=True)):
            for ids in (reference.ranking(theirs)[: knees[row]], reference.ranking(mine)[: reference.knee(mine)]):
                total = total + reference.logits_difference(mine, theirs, ids, 3.0, "reverse_kl")
        return torch.autograd.grad(total, s)[0]

    exact_gradient = gradient(exact, [reference.knee(row) for row in exact])
    difference = gradient(rebuilt, knee.tolist()) - exact_gradient
    assert found.gradient_error == pytest.approx(float(difference.norm() / exact_gradient.norm()), rel=1e-3)
    at_states = difference @ head.double()
    wanted = at_states.norm() / (exact_gradient @ head.double()).norm()
    assert found.state_gradient_error == pytest.approx(float(wanted), rel=1e-3)


def test_recall_of_a_sparse_signal(teacher):
    _, head, exact = teacher
    student = Student("s", exact + normal(3, 40, 120, dtype=torch.float32), head)
    ordered, ids = exact.sort(dim=-1, descending=True)
    knee = torch.tensor([reference.knee(row) for row in exact])
    sparse = SparseSignal(ids[:, :10], ordered[:, :10], ordered[:, 10:].logsumexp(-1), knee, 120)
    found = compare(student, DenseSignal(exact), sparse)
    stored = hits = 0
    for row, mine in enumerate(student.logits):
        led = reference.ranking(mine)[: reference.knee(mine)]
        hits += len(led)
        stored += len(set(led) & set(ids[row, :10].tolist()))
    assert found.student_led_recall == pytest.approx(stored / hits)
    assert found.rms_error == found.largest_error == 0.0  # over the logits that are stored


def test_no_position():
    nothing = torch.zeros(0, 30)
    for student in make_students(nothing, normal(2, 30, 8, dtype=torch.float32), seed=0):
        found = compare(student, DenseSignal(nothing), DenseSignal(nothing))
        assert (found.kl_nats, found.gradient_error, found.largest_error) == (0.0, 0.0, 0.0)
