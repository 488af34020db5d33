"""Defines the names, shapes and codecs of a store's arrays; no other module hard-codes them."""

import hashlib
import math
import warnings
from datetime import UTC, datetime
from typing import Any, get_args

import numpy as np
from zarr.codecs import Crc32cCodec, ZstdCodec

from switchkd.settings import HiddenDtype, PayloadName

FORMAT = "switchkd-store"
VERSION = 2  # written; stores of version 1 are read, and finished, as version 1
VERSIONS = (1, 2)

MANIFEST_KEY = "switchkd"  # attribute of the root group
PART_KEY = "switchkd_part"  # attribute of a part's group
ID_OF_RANK = "vocab/id_of_rank"

OFFSET, DIGEST, STATUS = "samples/offset", "samples/digest", "samples/status"
TOKENS = "samples/tokens"  # optional, since version 2
GAP, HEIGHT, BOTTOM = "topk/gap", "topk/height", "topk/bottom"
ORDER = "topk/order"  # since version 2
STATE, SCALE = "hidden/state", "hidden/scale"  # scales: of int8 states, in version 1
INT8_BLOCK = 32  # int8 states of version 1 share a scale per this many entries
STEP, MEAN = "hidden/step", "hidden/mean"  # of the store, not of a part: [d] float32, for states stored as steps
STATS = "stats"
VISUAL_ADVANTAGE = "visual_advantage"  # optional, since version 2
PAYLOADS: tuple[str, ...] = get_args(PayloadName)
HIDDEN_DTYPES: tuple[str, ...] = get_args(HiddenDtype)  # written; int8 is read in stores of version 1
STATS_DTYPE = "float32"  # of the logits that statistics, knees and top-k are taken from, since version 2
# Columns of `stats`, in order; all are computed over the N rows in use, before truncation to top-k and rounding.
STAT_COLUMNS = ("z_max", "z_min", "logsumexp", "tail_logsumexp", "knee")

# A chunk is the unit of random access and is decoded whole; a sample has some hundred positions. But small chunks compress badly.
CHUNK_NUMBERS = 1 << 13
CHUNK_POSITIONS = (32, 256)  # minimum, maximum
DIGEST_COLUMNS = ("input_ids", "supervised", "image")

# numcodecs warns on every use that its codecs are outside the Zarr v3 specification; the format's README documents this.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")


def digest_bytes(data: bytes) -> str:
    """Return the BLAKE2b digest of a file's bytes as the format writes it: 8 bytes, hexadecimal."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def now() -> str:
    """Return the time as the format writes it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def rank_dtype(vocab_rows: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds a rank among `vocab_rows`."""
    return np.dtype(np.uint16 if vocab_rows <= 1 << 16 else np.uint32)


def array_options(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the keyword arguments of `zarr.Group.create_array` for one array of a part.

    Position arrays are split into chunks of whole positions, all inside one shard, so that each array of a part is one file and
    random access reads one chunk. Every chunk has a crc32c.
    """
    from zarr.codecs.numcodecs import PCodec

    positional = name in (GAP, HEIGHT, BOTTOM, ORDER, STATE, STATS, VISUAL_ADVANTAGE)
    rows = chunk_positions(shape) if positional else max(shape[0], 1)
    # Gaps grow along a row; columns with similar distributions share a chunk.
    columns = [_gap_columns(size) if name == GAP else size for size in shape[1:]]
    chunks = (rows, *columns)
    shards = tuple(max(-(-size // chunk), 1) * chunk for size, chunk in zip(shape, chunks, strict=True))
    options: dict[str, Any] = {"shape": shape, "chunks": chunks, "shards": shards, "filters": []}
    if name in (GAP, HEIGHT):  # gaps and heights are differences already
        pcodec = PCodec(level=6, delta_spec="try_consecutive", delta_encoding_order=0)
        return options | {"serializer": pcodec, "compressors": [Crc32cCodec()]}
    if name == STATE:  # automatic mode selection takes as long as compressing and has no benefit
        pcodec = PCodec(level=8, mode_spec="classic", delta_spec="none")
        return options | {"serializer": pcodec, "compressors": [Crc32cCodec()]}
    if name in (BOTTOM, ORDER, STATS, OFFSET, VISUAL_ADVANTAGE):
        return options | {"serializer": PCodec(level=8), "compressors": [Crc32cCodec()]}
    return options | {"compressors": [ZstdCodec(level=3), Crc32cCodec()]}


def chunk_positions(shape: tuple[int, ...]) -> int:
    """Return the positions that a chunk of an array of this shape [P, …] holds: a power of 2."""
    least, most = CHUNK_POSITIONS
    fitting = max(CHUNK_NUMBERS // max(math.prod(shape[1:]), 1), 1)
    return min(max(1 << fitting.bit_length() - 1, least), most)


def _gap_columns(top_k: int) -> int:
    return min(top_k, max(64, top_k // 8))
