"""Writes a store's top-k logits as parquet, for trainers that read offline logprobs: ids, log-probabilities, the rest's.

One file a part, `part-00000.parquet`, …, one row a sample:

    sample      int64                      its row in the data file
    status      string                     "ok", or why it was not captured; then the lists are null
    ids         list<list<int32>>          [P][K], the k largest tokens of each position, in descending order
    logprobs    list<list<float32>>        [P][K], log p over the rows in use, natural logarithm
    tail        list<float32>              [P], the log-probability of all other tokens together; -inf if there is none

    visual_advantage  list<float32>        [P], nats; only of a store that has it

A sample's positions are those of its supervised tokens, in order. The schema's metadata hold the store's manifest (`switchkd`).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from switchkd.errors import StoreError
from switchkd.stores.manifest import Manifest
from switchkd.stores.reader import TeacherStore


@dataclass(frozen=True)
class PartExported:
    """One part of an export."""

    part: int
    file: Path
    samples: int
    positions: int
    written: bool  # False: it was there already


def export_parquet(store: TeacherStore, folder: Path) -> Iterator[PartExported]:
    """Write the parts of a store as parquet files, one after the other; those that are there already are left.

    Args:
        folder: is created; holds nothing, or an unfinished export of this store.

    Raises:
        StoreError: the store holds no top-k logits, or `folder` holds the export of another store.
        OSError: a file cannot be written; the finished ones are whole.
    """
    import pyarrow.parquet as parquet

    if not store.manifest.has_topk:
        raise StoreError(
            f"{store.path} holds hidden states alone, and an export is of top-k logits: cache with --payload topk or both"
        )
    identity = hashlib.blake2b(_text_of(store.manifest).encode(), digest_size=16).hexdigest()
    store = TeacherStore(store.path, store.cache_bytes, "topk") if store.manifest.has_hidden else store
    folder.mkdir(parents=True, exist_ok=True)
    for part in store.parts():
        file = folder / f"part-{part:05d}.parquet"
        samples = store.manifest.part_samples(part)
        if file.is_file():
            held = parquet.read_metadata(file)
            found = (held.metadata or {}).get(b"switchkd-identity", b"").decode()
            if found != identity:
                raise StoreError(f"{file} is of another store than {store.path}; remove it, or name another folder")
            yield PartExported(part, file, len(samples), 0, written=False)
            continue
        table, positions = _table(store, samples, identity)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            parquet.write_table(table, unfinished, compression="zstd")
            unfinished.rename(file)
        finally:
            unfinished.unlink(missing_ok=True)
        yield PartExported(part, file, len(samples), positions, written=True)


def _table(store: TeacherStore, samples: range, identity: str) -> tuple[Any, int]:
    """Return a part as a table, and its number of positions."""
    import pyarrow as pa

    manifest = store.manifest
    floats = pa.list_(pa.float32())
    of_positions = {"ids": pa.list_(pa.list_(pa.int32())), "logprobs": pa.list_(floats), "tail": floats}
    if manifest.visual_advantage:
        of_positions["visual_advantage"] = floats
    columns: dict[str, list[Any]] = {name: [] for name in ("sample", "status", *of_positions)}
    positions = 0
    for index in samples:
        found = store[index]
        columns["sample"].append(index)
        columns["status"].append(manifest.statuses.get(str(found.status), str(found.status)))
        if found.status:
            for name in of_positions:
                columns[name].append(None)
            continue
        payload = found.payload
        assert payload.ids is not None and payload.logits is not None
        whole = payload.stat("logsumexp")[:, None]
        columns["ids"].append(list(payload.ids))
        columns["logprobs"].append(list((payload.logits - whole).astype(np.float32)))
        columns["tail"].append((payload.stat("tail_logsumexp") - whole[:, 0]).astype(np.float32))
        if payload.visual_advantage is not None:
            columns["visual_advantage"].append(payload.visual_advantage)
        positions += len(payload)
    schema = pa.schema(
        {"sample": pa.int64(), "status": pa.string()} | of_positions,
        metadata={"switchkd": _text_of(manifest), "switchkd-identity": identity},
    )
    return pa.table(columns, schema=schema), positions


def _text_of(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), ensure_ascii=False, sort_keys=True, default=str)
