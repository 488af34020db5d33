"""Verifies all parts of a store, and removes bad parts so that the next run writes exactly these again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import StoreError
from switchkd.stores import layout
from switchkd.stores.codec import LARGEST_STEP_COUNT, STAT_STEPS, HiddenSteps
from switchkd.stores.manifest import Manifest
from switchkd.stores.part import OtherTables
from switchkd.stores.payload import Payload
from switchkd.stores.reader import TeacherStore
from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Storage
from switchkd.stores.storage.paths import MARKER


@dataclass(frozen=True)
class Finding:
    """An error found in one part."""

    part: int
    message: str


def verify(store: TeacherStore) -> Iterator[tuple[int, list[Finding]]]:
    """Check every committed part, one after the other; yields (part number, findings).

    Files: all listed files exist with their size and digest, and no others. Arrays: every chunk decodes (crc32c), shapes agree,
    offsets ascend. Statistics: finite, z_min ≤ k-th logit ≤ z_max, logsumexp ≥ z_max, tail ≤ logsumexp, 2 ≤ knee ≤ N, ids distinct.
    Hidden states: finite, and not further from the mean than a writer encodes.
    """
    for part in store.parts():
        yield part, [Finding(part, message) for message in _problems(store, part)]


def missing_parts(store: TeacherStore) -> list[int]:
    """Return the numbers of the parts that are not committed."""
    return sorted(set(range(store.manifest.part_count)) - set(store.parts()))


def repair(store: TeacherStore) -> list[int]:
    """Remove bad parts and return their numbers; running `cache-teacher` again then writes exactly these.

    A part is made invisible atomically before it is deleted, so that an interrupted repair leaves no incomplete part.

    Raises:
        StoreError: no part fits the store's tables, so the tables are what is wrong; nothing is removed.
    """
    parts = store.parts()
    if parts and all(_has_other_tables(store, part) for part in parts):
        raise StoreError(
            f"no part of {store.path} was encoded with its tables ({layout.ID_OF_RANK}, {layout.STEP}, {layout.MEAN}): these are "
            "not what was written; restore them. Nothing was removed"
        )
    dropped = []
    for part, findings in verify(store):
        if findings:
            store.storage.remove_part(part)
            dropped.append(part)
    return dropped


def _has_other_tables(store: TeacherStore, part: int) -> bool:
    try:
        store.part_entry(part)
    except OtherTables:
        return True
    except StoreError:
        return False
    return False


def _problems(store: TeacherStore, part: int) -> Iterator[str]:
    try:
        entry = store.part_entry(part)
        yield from _file_problems(store.storage, paths.part_key(part), entry["files"])
        yield from _table_problems(store, part)
        yield from _payload_problems(store.part_payload(part), store.manifest, store.hidden_steps)
    except StoreError as error:
        yield str(error)


def _file_problems(storage: Storage, part_key: str, listed: dict[str, dict[str, object]]) -> Iterator[str]:
    for name, expected in listed.items():
        if layout.digest_bytes(storage.read(f"{part_key}/{name}")) != expected["blake2b"]:
            yield f"{storage.uri_of(f'{part_key}/{name}')} is not what was written: its digest differs"
    for extra in sorted(storage.file_sizes(part_key).keys() - listed.keys() - {MARKER}):
        yield f"{storage.uri_of(f'{part_key}/{extra}')} does not belong to the part"


def _table_problems(store: TeacherStore, part: int) -> Iterator[str]:
    offset, status = store.part_offsets(part), store.part_statuses(part)
    if offset[0] != 0 or (np.diff(offset) < 0).any():
        yield "samples/offset does not rise from 0"
    if ((np.diff(offset) > 0) & (status != 0)).any():
        yield "a skipped sample has positions"
    if unknown := sorted({int(code) for code in status} - {int(code) for code in store.manifest.statuses}):
        yield f"samples/status holds unknown codes {unknown}"


def _payload_problems(payload: Payload, manifest: Manifest, steps: HiddenSteps | None) -> Iterator[str]:
    vocab_rows = manifest.vocab_rows
    z_max, z_min, logsumexp, tail, knee = (payload.stat(name) for name in layout.STAT_COLUMNS)
    checks: dict[str, Any] = {
        "a statistic is not finite": ~np.isfinite(np.stack([z_max, z_min, logsumexp, knee])).all(0) | np.isnan(tail),
        "logsumexp lies below z_max": logsumexp < z_max - _slack(z_max),
        "z_min lies above z_max": z_min > z_max,
        "tail_logsumexp lies above logsumexp": tail > logsumexp + _slack(logsumexp),
        "the knee lies outside 2 … N": (knee < 2) | (knee > vocab_rows),
    }
    if payload.ids is not None and payload.logits is not None:
        smallest = payload.logits[:, -1]
        ordered = np.sort(payload.ids, axis=-1)
        checks |= {
            "an id occurs twice in a position": (np.diff(ordered, axis=-1) == 0).any(-1),
            "an id lies outside the vocabulary": (ordered[:, 0] < 0) | (ordered[:, -1] >= vocab_rows),
            "the k-th logit lies below z_min": smallest < z_min - _slack(z_min) - manifest.coarse,
        }
    if payload.hidden is not None:
        checks["a hidden state is not finite"] = ~np.isfinite(payload.hidden).all(-1)
        if steps is not None:
            furthest = (LARGEST_STEP_COUNT + 1) * steps.step
            checks["a hidden state lies too many steps from the mean"] = (
                np.abs(payload.hidden - steps.mean) > furthest
            ).any(-1)
    for what, wrong in checks.items():
        if wrong.any():
            yield f"{what} ({int(wrong.sum())} of {len(wrong)} positions)"


def _slack(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the tolerance for values of this size: the error of float32 sums plus that of rounded statistics."""
    return (1e-5 * np.abs(values) + 2 / STAT_STEPS).astype(np.float32)
