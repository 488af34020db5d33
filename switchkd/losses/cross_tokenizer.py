"""Align for a teacher with another tokenizer: pairs vocabulary entries with equal bytes and positions with equal preceding text.

Align (eq. 4) compares distributions over one vocabulary at one position. For two tokenizers, the comparison is made

* at the positions of an answer where both models predict the continuation of the same text (each position is one supervised
  token, identified by its start offset in the text);
* over the M entries that stand for the same bytes in both vocabularies, plus one bucket for the remaining mass: its logit is the
  log-sum-exp of all other logits, so the softmax over the M + 1 logits gives each model's probabilities of these events.

VSD (eq. 6) needs none of this: z_switch and z_T are both the teacher's, at its own positions.

Approximations: an entry that only one vocabulary has goes into the bucket, even where the other tokenizer encodes the same text as
several tokens. A shared token is compared with its counterpart even where the other tokenizer would prefer a longer token with
the same beginning. Positions that start inside a token of the other tokenizer are left out of Align.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchkd.losses.fused import Block, LossOfBlock, SwitchStates, loss_in_chunks
from switchkd.losses.lm_head import LMHead
from switchkd.losses.objective import FusedLoss, LossTerms, Objective
from switchkd.losses.signals import DenseSignal, TeacherSignal


@dataclass(frozen=True)
class VocabMap:
    """Pairs of ids that stand for the same bytes."""

    student_ids: Tensor  # [M] int64
    teacher_ids: Tensor  # [M] int64
    student_rows: int  # N_S, rows in use
    teacher_rows: int  # N_T

    @property
    def has_rest(self) -> bool:
        """Whether either vocabulary has entries that the other does not have."""
        return len(self.student_ids) < max(self.student_rows, self.teacher_rows)

    def of_student(self, logits: Tensor) -> Tensor:
        """Return the student's logits over shared entries and the rest bucket, [T, V_S] → [T, M + 1] (M if there is no rest)."""
        return self._mapped(logits[:, : self.student_rows], self.student_ids)

    def of_teacher(self, logits: Tensor) -> Tensor:
        """Return the teacher's logits over the same entries, [T, V_T] → [T, M + 1]."""
        return self._mapped(logits[:, : self.teacher_rows], self.teacher_ids)

    def _mapped(self, logits: Tensor, ids: Tensor) -> Tensor:
        shared = logits[:, ids]
        if not self.has_rest:
            return shared
        # A side without unshared entries gives the bucket the logit of its least likely entry.
        none = len(ids) == logits.shape[-1]
        rest = shared.amin(-1) if none else logits.index_fill(1, ids, -torch.inf).logsumexp(-1)
        return torch.cat([shared, rest.unsqueeze(-1)], dim=-1)

    def to(self, device: torch.device) -> "VocabMap":
        """Return the map with its tensors on `device`."""
        return replace(self, student_ids=self.student_ids.to(device), teacher_ids=self.teacher_ids.to(device))


def map_vocabularies(student: Any, teacher: Any, student_rows: int, teacher_rows: int) -> VocabMap:
    """Pair the entries of two fast tokenizers that stand for the same bytes; end tokens are always paired."""
    ours, theirs = (_ids_by_bytes(*side) for side in ((student, student_rows), (teacher, teacher_rows)))
    pairs = {ours[text]: theirs[text] for text in ours.keys() & theirs.keys()}
    ends = student.eos_token_id, teacher.eos_token_id
    if None not in ends:
        pairs = {s: t for s, t in pairs.items() if s != ends[0] and t != ends[1]} | {ends[0]: ends[1]}
    ids = torch.tensor(sorted(pairs.items()), dtype=torch.long).reshape(-1, 2)
    return VocabMap(ids[:, 0].contiguous(), ids[:, 1].contiguous(), student_rows, teacher_rows)


def _ids_by_bytes(tokenizer: Any, rows: int) -> dict[tuple[bool, bytes], int]:
    """Return id by (whether special, bytes that it stands for); of several ids for the same bytes the first."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in backend["added_tokens"]}
    styles = json.dumps([backend["pre_tokenizer"], backend["decoder"], backend["normalizer"]])
    found: dict[tuple[bool, bytes], int] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if number < rows:
            text = token.encode() if number in special else _bytes_of(token, styles)
            found.setdefault((number in special, text), number)
    return found


def _bytes_of(token: str, styles: str) -> bytes:
    """Decode a vocabulary entry to the bytes that it stands for."""
    if "ByteLevel" in styles:
        return bytes(_BYTE_OF[char] for char in token) if all(char in _BYTE_OF for char in token) else token.encode()
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode() if "▁" in styles else token.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes map to themselves, the others to code points from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def align_positions(student: NDArray[np.int64], teacher: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each student position, the teacher position that follows the same text, or -1 if there is none; [P_S].

    Args:
        student, teacher: start offsets of each side's positions in the text, [P_S] and [P_T]. Several tokens of one character have
            the same offset; of these, the last one is preceded by the whole text.
    """
    theirs = {int(start): number for number, start in enumerate(teacher)}
    last = {int(start): number for number, start in enumerate(student)}
    pairs = [theirs.get(int(start), -1) if last[int(start)] == number else -1 for number, start in enumerate(student)]
    return np.array(pairs, np.int64)


def loss_over_vocabularies(
    objective: Objective,
    vocabularies: VocabMap,
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    teacher: TeacherSignal,
    partner: Tensor,
    switch: SwitchStates | None = None,
    weights: Tensor | None = None,
    switch_weights: Tensor | None = None,
    chunk_positions: int | None = None,
) -> FusedLoss:
    """Compute CE + λ1·Align + λ2·VSD for two tokenizers; compare `Objective.fused`.

    Align is summed over the positions that have a partner; the other positions contribute 0.

    Args:
        hidden: the student's final hidden states at its P_S positions, [P_S, d]. head, targets: its own.
        teacher: its signal at its P_T positions; all N_T logits must be available.
        partner: [P_S] int64, see `align_positions`.
        switch: as in `Objective.fused`, but at the teacher's P_T positions.
        weights: [P_S]. switch_weights: [P_T], of the teacher's positions.
    """

    def open_student(chunk: slice) -> LossOfBlock:
        there = partner[chunk] >= 0
        teacher_logits = _rows_of(teacher, partner[chunk][there])
        before = [0, *there.cumsum(0).tolist()]

        def of_student(block: Block) -> tuple[Tensor, Tensor]:
            rows, inside = block.rows, block.in_chunk
            weight = None if weights is None else weights[rows]
            ce = objective.terms(block.logits, targets[rows], None, None, targets[rows] < 0, weight).ce
            signal = DenseSignal(vocabularies.of_teacher(teacher_logits[before[inside.start] : before[inside.stop]]))
            ours = vocabularies.of_student(block.logits[there[inside]])
            align = objective.divergence(ours, signal, None if weight is None else weight[there[inside]])
            return ce + objective.align_weight * align, torch.stack([ce, align])

        return of_student

    total, sums = loss_in_chunks(hidden, head, open_student, chunk_positions=chunk_positions)
    ce, align = sums if len(sums) else total.detach().expand(2)
    if switch is None:
        return FusedLoss(total, LossTerms(ce, align, None))
    seen = switch.on_image.nonzero().squeeze(-1)

    def open_switch(chunk: slice) -> LossOfBlock:
        signal = teacher.select(seen[chunk]).slice_rows(slice(None))

        def of_switch(block: Block) -> tuple[Tensor, Tensor]:
            weight = None if switch_weights is None else switch_weights[seen[block.rows]]
            logits = block.logits[:, : vocabularies.teacher_rows]
            vsd = objective.divergence(logits, signal.slice_rows(block.in_chunk), weight) * switch.scale
            return objective.vsd_weight * vsd, vsd.unsqueeze(0)

        return of_switch

    switched, sums = loss_in_chunks(switch.hidden, switch.head, open_switch, chunk_positions=chunk_positions)
    vsd = sums[0] if len(sums) else switched.detach()
    return FusedLoss(total + switched, LossTerms(ce, align, vsd))


def _rows_of(teacher: TeacherSignal, positions: Tensor) -> Tensor:
    """Return a signal's logits at some positions, [p, N_T]; all of them must be available."""
    signal = teacher.select(positions).slice_rows(slice(None))
    assert isinstance(signal, DenseSignal)
    return signal.logits
