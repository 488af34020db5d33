"""`switchkd store audit`: run the teacher again on random samples and measure the error of the store's payloads.

The reference is the live teacher as training would run it: in the dtype of the capture, with float32 logits. Beside the payloads
stand two rows about the teacher itself: its own run-to-run difference, sample by sample instead of in batches, which is a lower
bound for the error of any store; and the same weights run in float32 throughout, which tells what the teacher's own dtype costs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchkd.data.encoded import EncodedSample, collate, pad_id_of
from switchkd.data.samples import SampleFile
from switchkd.fingerprints import hash_tokenizer
from switchkd.losses.lm_head import LMHead
from switchkd.losses.signals import HiddenSignal, SparseSignal, TeacherSignal
from switchkd.models.checkpoint import Checkpoint, check_compatible, open_checkpoint, teacher_identity, with_image_mode
from switchkd.models.components import lm_head_of
from switchkd.models.vlm import freeze, load_model, states_at_positions
from switchkd.pipelines import visual_advantage
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.capture.fidelity import Fidelity, Student, compare, exact_signal, make_students
from switchkd.pipelines.capture.options import AuditOptions
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.stored_teacher import (
    StoredHidden,
    StoredTopK,
    TeacherSource,
    choose_samples,
    encode_as_cached,
    encoder_of_store,
    teacher_columns,
)
from switchkd.positions import targets
from switchkd.settings import StoreLocation
from switchkd.stores import TeacherStore
from switchkd.stores.reader import pick_store

CONTROL = "control: teacher, sample by sample"
PRECISION = "teacher in float32"


@dataclass(frozen=True)
class AuditRow:
    """One comparison with the live teacher."""

    name: str  # a payload, `CONTROL` or `PRECISION`
    student: str
    fidelity: Fidelity


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit."""

    store: StoreLocation
    samples: int
    positions: int
    trained_from: str  # the payload that training reads: the name of its rows
    dtype: str  # of the teacher
    rows: list[AuditRow]  # by payload, then the rows of the teacher itself; of each, one a student
    looking: visual_advantage.VisualAdvantage | None = None  # None where it was not asked for

    def gradient_error(self, name: str) -> float:
        """Return the error of the gradient with respect to the student's logits, mean over students; 0 without such rows."""
        found = [row.fidelity.gradient_error for row in self.rows if row.name == name]
        return sum(found) / max(len(found), 1)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        store = f"training from this store ({self.trained_from}) differs from the live teacher by "
        store += f"{self.gradient_error(self.trained_from):.2%}"
        names = {row.name for row in self.rows}
        own = f"the teacher's own precision ({self.dtype}) by {self.gradient_error(PRECISION):.2%}"
        if PRECISION not in names:
            own = (
                "the teacher runs in float32" if self.dtype == "float32" else "the teacher's own precision was left out"
            )
        return f"{store}, {own}: error of the gradient of Align at the student's logits, mean over students"


@dataclass(frozen=True)
class _Positions:
    """What is compared at P positions."""

    signals: dict[str, TeacherSignal]  # name of a payload → signal
    live: Tensor  # the teacher's final states in batches, [P, d]
    alone: Tensor  # sample by sample
    whole: Tensor | None  # of the same weights in float32
    student: Tensor | None  # the final states of a student that was given, [P, d_S]
    looking: visual_advantage.VisualAdvantage | None


def audit(options: AuditOptions) -> AuditReport:
    """Compare a store with its teacher on random samples.

    Raises:
        StoreMismatch: the store belongs to another teacher or tokenizer, or a sample changed since.
        InputError: something given cannot be used.
    """
    teacher = open_checkpoint(options.teacher, options.trust_remote_code)
    wanted = {"tokenizer": hash_tokenizer(teacher.tokenizer), "teacher": teacher_identity(teacher)}
    store = pick_store(options.store, wanted)
    student = None if options.student is None else open_checkpoint(options.student, options.trust_remote_code)
    if student is not None:
        check_compatible(teacher, student, switch=False, one_text=True)
    teacher = with_image_mode(teacher, store.manifest.image_mode, store.manifest.max_pixels)
    chosen = choose_samples(store, options.samples, options.seed)
    found, heads = _gather(options, store, teacher, student, chosen)
    rows = _compare(options, store, found, heads)
    names, dtype = list(found.signals), store.manifest.teacher["dtype"]
    return AuditReport(store.path, len(chosen), len(found.live), names[-1], dtype, rows, found.looking)


def _gather(
    options: AuditOptions, store: TeacherStore, teacher: Checkpoint, student: Checkpoint | None, chosen: list[int]
) -> tuple[_Positions, tuple[LMHead, LMHead | None]]:
    """Run the models over the chosen samples; returns what is compared, and the LM heads of teacher and student."""
    manifest, samples = store.manifest, SampleFile(options.data)
    encoder = encoder_of_store(manifest, teacher, options.images)
    dtype = manifest.teacher["dtype"]
    with_float32 = options.own_precision and dtype != "float32"
    batches = [chosen[start : start + options.batch_size] for start in range(0, len(chosen), options.batch_size)]
    passes = 1 + with_float32 + (student is not None) + options.visual_advantage
    encoded: list[list[EncodedSample]] = []
    live, alone, whole, of_student = [], [], [], []
    with Progress("auditing", passes * len(chosen), "samples") as progress:
        model: Any = freeze(load_model(teacher, dtype=dtype)).to(options.device)
        head = lm_head_of(model).rows(manifest.vocab_rows)
        head = head._replace(weight=head.weight.clone())
        for indices in batches:
            encoded.append([encode_as_cached(encoder, samples, store, index) for index in indices])
            live.append(_states(model, encoded[-1], teacher))
            alone += [_states(model, [sample], teacher) for sample in encoded[-1]]
            progress.advance(len(indices), positions=len(live[-1]))
        measured = None
        if options.visual_advantage:
            shown = [samples[index] for index in chosen]
            pad = pad_id_of(teacher.tokenizer)
            measured = visual_advantage.measure(model, head, encoder, shown, pad, options.batch_size)
            progress.advance(len(chosen))
        if with_float32:
            model = model.float()
            for batch in encoded:
                whole.append(_states(model, batch, teacher))
                progress.advance(len(batch), positions=len(whole[-1]))
        del model
        student_head = None
        if student is not None:
            model = freeze(load_model(student, dtype="float32")).to(options.device)
            student_head = lm_head_of(model).rows(manifest.vocab_rows)
            for batch in encoded:
                of_student.append(_states(model, batch, student))
                progress.advance(len(batch), positions=len(of_student[-1]))
    columns = collate([sample for batch in encoded for sample in batch], pad_id_of(teacher.tokenizer))
    stored = {name: column.to(options.device) for name, column in teacher_columns(store.payload(chosen)).items()}
    read = Batch.of(columns | stored)
    keep = _some(sum(map(len, live)), options.positions, options.seed).to(options.device)
    whole_signals = {name: source.signal(read) for name, source in _sources(store, head, options).items()}
    signals = {name: signal.select(keep) for name, signal in whole_signals.items()}
    looking = None
    if measured is not None:
        trained_from = list(whole_signals.values())[-1]
        assert isinstance(trained_from, HiddenSignal | SparseSignal)
        kept = visual_advantage.log_probs_of_signal(trained_from, targets(columns["labels"]))
        counts = torch.tensor([sample.positions for batch in encoded for sample in batch])
        on_image = columns["has_image"].repeat_interleave(counts)
        held = read.teacher_visual_advantage
        gains = None if held is None else held.double().cpu()[on_image]
        looking = visual_advantage.summarise(measured, kept[on_image], gains)
    found = _Positions(
        signals,
        torch.cat(live)[keep],
        torch.cat(alone)[keep],
        torch.cat(whole)[keep] if whole else None,
        torch.cat(of_student)[keep] if of_student else None,
        looking,
    )
    return found, (head, student_head)


def _compare(
    options: AuditOptions, store: TeacherStore, found: _Positions, heads: tuple[LMHead, LMHead | None]
) -> list[AuditRow]:
    head, student_head = heads
    exact = exact_signal(found.live, head)
    if found.student is not None and student_head is not None:
        logits = student_head.logits(found.student)
        students = [Student(f"{options.student}", logits, student_head.weight, student_head.logit_map)]
    else:
        students = make_students(exact.logits, head.weight, options.seed)
    signals = dict(found.signals)
    if found.whole is not None:
        signals[PRECISION] = exact_signal(found.whole, head._replace(weight=head.weight.float()))
    signals[CONTROL] = exact_signal(found.alone, head)
    rows = []
    with Progress("comparing", len(signals) * len(students), "rows") as progress:
        for name, signal in signals.items():
            for student in students:
                rows.append(AuditRow(name, student.name, compare(student, exact, signal)))
                progress.advance(1)
    return rows


def _some(positions: int, most: int, seed: int) -> Tensor:
    """Choose at most `most` random positions, ascending."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(np.sort(random.choice(positions, min(positions, most), replace=False)))


@torch.no_grad()
def _states(model: Any, batch: list[EncodedSample], checkpoint: Checkpoint) -> Tensor:
    return states_at_positions(model, collate(batch, pad_id_of(checkpoint.tokenizer)))


def _sources(store: TeacherStore, head: LMHead, options: AuditOptions) -> dict[str, TeacherSource]:
    """Return the sources of the store's payloads; the last one is that which training reads."""
    manifest = store.manifest
    sources: dict[str, TeacherSource] = {}
    if manifest.has_topk:
        sources[f"topk, k = {manifest.top_k}, tail {options.tail}"] = StoredTopK(manifest.vocab_rows, options.tail)
    if manifest.has_hidden:
        how = f"steps {manifest.hidden_error:g}" if manifest.hidden_error else manifest.hidden_dtype
        sources[f"hidden, {how}"] = StoredHidden(
            head.weight, manifest.vocab_rows, manifest.has_exact_knee, head.logit_map
        )
    return sources
