"""`switchkd store audit`: run the teacher again on random samples and measure the error of the store's payloads.

For every payload: KL, the share of the student-led ids whose logits are stored, the error of the DBiLD gradient, and the largest
logit error. The control is the teacher against itself, run sample by sample instead of in batches, in the dtype of the capture: a
lower bound for the error of any store.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from switchkd.data.encoding import EncodedSample, collate, pad_id_of
from switchkd.data.samples import SampleFile
from switchkd.fingerprints import hash_tokenizer
from switchkd.losses import dbild_loss
from switchkd.losses.selection import leading_entries
from switchkd.losses.signals import DenseSignal, SparseSignal, TeacherSignal
from switchkd.models.checkpoint import Checkpoint, check_compatible, open_checkpoint, teacher_identity, with_image_mode
from switchkd.models.vlm import freeze, load_model, states_at_positions
from switchkd.pipelines.batch import Batch
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
from switchkd.settings import StoreLocation
from switchkd.stores import TeacherStore
from switchkd.stores.reader import pick_store

# Without a student, its logits are the teacher's LM head on states with this much noise, in standard deviations of the states.
PERTURBATION = 0.2
CONTROL = "control: teacher against itself"


@dataclass(frozen=True)
class Fidelity:
    """The error of one reconstruction of the teacher's logits; means over positions."""

    name: str
    kl_nats: float  # KL(live ‖ reconstruction), all N rows
    student_led_recall: float  # share of the student-led ids whose logit is stored, not modelled
    gradient_error: float  # ‖g - g_live‖ / ‖g_live‖ of dbild-rkl with respect to the student's logits
    largest_logit_error: float  # over stored logits


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit."""

    store: StoreLocation
    samples: int
    positions: int
    student: str
    rows: list[Fidelity]  # one per payload, then the control


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
    manifest = store.manifest
    teacher = with_image_mode(teacher, manifest.image_mode)
    encoder = encoder_of_store(manifest, teacher, options.images)
    chosen = choose_samples(store, options.samples, options.seed)
    samples = SampleFile(options.data)
    model: Any = freeze(load_model(teacher, dtype=manifest.teacher["dtype"])).to(options.device)
    sources = _sources(store, model.lm_head.weight, options)
    sums = {name: _Sums() for name in [*sources, CONTROL]}
    student_logits = _student(student, model, options)
    positions = 0
    with Progress("auditing", len(chosen), "samples") as progress:
        for start in range(0, len(chosen), options.batch_size):
            indices = chosen[start : start + options.batch_size]
            batch = [encode_as_cached(encoder, samples, store, index) for index in indices]
            states = _states(model, batch, teacher)
            alone = torch.cat([_states(model, [sample], teacher) for sample in batch])
            live, control = (model.lm_head(x)[:, : manifest.vocab_rows].float() for x in (states, alone))
            columns = teacher_columns(store.payload(indices))
            columns = {name: column.to(options.device) for name, column in columns.items()}
            s = student_logits(batch, states)[:, : manifest.vocab_rows].float()
            read = Batch.of(collate(batch, pad_id_of(teacher.tokenizer)) | columns)
            signals: dict[str, TeacherSignal] = {name: source.signal(read) for name, source in sources.items()}
            for name, signal in (signals | {CONTROL: DenseSignal(control)}).items():
                sums[name].add(s, live, signal)
            positions += len(live)
            progress.advance(len(batch), positions=len(live))
    words = (
        f"{options.student}"
        if student is not None
        else f"the teacher with {PERTURBATION:g} standard deviations of noise"
    )
    return AuditReport(store.path, len(chosen), positions, words, [total.result(name) for name, total in sums.items()])


@torch.no_grad()
def _states(model: LlavaForConditionalGeneration, batch: list[EncodedSample], checkpoint: Checkpoint) -> Tensor:
    return states_at_positions(model, collate(batch, pad_id_of(checkpoint.tokenizer)))


def _sources(store: TeacherStore, head: Tensor, options: AuditOptions) -> dict[str, TeacherSource]:
    manifest = store.manifest
    sources: dict[str, TeacherSource] = {}
    if manifest.has_topk:
        sources[f"topk, k = {manifest.top_k}, tail {options.tail}"] = StoredTopK(manifest.vocab_rows, options.tail)
    if manifest.has_hidden:
        sources[f"hidden, {manifest.hidden_dtype}"] = StoredHidden(head, manifest.vocab_rows, manifest.has_exact_knee)
    return sources


def _student(student: Checkpoint | None, teacher_model, options: AuditOptions):  # type: ignore[no-untyped-def]
    """Return a function (batch, teacher states) → student logits [P, V]."""
    if student is not None:
        model: Any = freeze(load_model(student, dtype="float32")).to(options.device)
        return lambda batch, states: model.lm_head(_states(model, batch, student))
    generator = torch.Generator().manual_seed(options.seed)

    def perturbed(batch: list[EncodedSample], states: Tensor) -> Tensor:
        noise = torch.randn(states.shape, generator=generator).to(states)
        logits: Tensor = teacher_model.lm_head(states + PERTURBATION * states.std() * noise)
        return logits

    return perturbed


class _Sums:
    """Sums over positions of what `Fidelity` reports."""

    def __init__(self) -> None:
        self.positions = 0
        self.kl = self.error = self.norm = self.largest = 0.0
        self.known = self.led = 0

    def add(self, student: Tensor, live: Tensor, signal: TeacherSignal) -> None:
        """Add one batch: student logits, live teacher logits [P, N], and the reconstruction to compare with them."""
        account = signal.rows(student).float()
        p, q = live.log_softmax(-1), account.log_softmax(-1)
        self.kl += float((p.exp() * (p - q)).sum())
        exact, found = _gradient(student, DenseSignal(live)), _gradient(student, signal)
        self.error += float((found - exact).pow(2).sum())
        self.norm += float(exact.pow(2).sum())
        known = torch.ones_like(live, dtype=torch.bool)
        if isinstance(signal, SparseSignal):
            known = torch.zeros_like(known).scatter_(-1, signal.ids, True)
        self.largest = max(self.largest, float((account - live)[known].abs().max()) if known.any() else 0.0)
        ids, k = leading_entries(student)
        leads = torch.arange(ids.shape[-1], device=ids.device) < k.unsqueeze(-1)
        self.known += int((known.gather(-1, ids) & leads).sum())
        self.led += int(leads.sum())
        self.positions += len(live)

    def result(self, name: str) -> Fidelity:
        """Return the means."""
        return Fidelity(
            name,
            self.kl / max(self.positions, 1),
            self.known / max(self.led, 1),
            (self.error / self.norm) ** 0.5 if self.norm else 0.0,
            self.largest,
        )


def _gradient(student: Tensor, signal: TeacherSignal) -> Tensor:
    """Return the gradient of dbild-rkl with respect to the student's logits, [P, N]."""
    logits = student.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(dbild_loss(logits, signal, reduction="sum"), logits)
    return gradient
