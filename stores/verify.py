"""Verifies all parts of a store, and removes bad parts so that the next run writes exactly these again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.counting import counted
from switchkd.errors import RunError, StoreError, StoreUnreadable
from switchkd.stores import layout
from switchkd.stores.codec import LARGEST_STEP_COUNT, STAT_STEPS, HiddenSteps
from switchkd.stores.manifest import Manifest
from switchkd.stores.part import OtherTables
from switchkd.stores.payload import Payload
from switchkd.stores.reader import TeacherStore
from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Storage
from switchkd.stores.storage.failures import unreadable
from switchkd.stores.storage.paths import MARKER


@dataclass(frozen=True)
class Finding:
    """An error found in one part."""

    part: int
    message: str
    unreadable: bool = False  # the part could not be read, which says nothing about it
    other_tables: bool = False  # the part was encoded with other tables than the store's


@dataclass(frozen=True)
class Repair:
    """What `repair` did."""

    dropped: list[int]  # bad parts, removed
    unreadable: list[Finding]  # parts that could not be read, left as they are
    recovered: list[int]  # parts that were bad at the first look and good at the second, left as they are


def verify(store: TeacherStore) -> Iterator[tuple[int, list[Finding]]]:
    """Check every committed part, one after the other; yields (part number, findings).

    Files: all listed files exist with their size and digest, and no others. Arrays: every chunk decodes (crc32c), shapes agree,
    offsets ascend. Statistics: finite, z_min ≤ k-th logit ≤ z_max, logsumexp ≥ z_max, tail ≤ logsumexp, 2 ≤ knee ≤ N, ids distinct.
    Visual advantages: finite. Hidden states: finite, and not further from the mean than a writer encodes. A part that could not be
    read has one finding that says so.

    Raises:
        StoreUnreadable: the parts cannot be listed. RunError: an object store cannot be reached.
    """
    for part in store.parts():
        yield part, _findings(store, part)


def missing_parts(store: TeacherStore) -> list[int]:
    """Return the numbers of the parts that are not committed."""
    return sorted(set(range(store.manifest.part_count)) - set(store.parts()))


def repair(store: TeacherStore, looked: Callable[[], None] = lambda: None) -> Repair:
    """Remove bad parts; running `cache-teacher` again then writes exactly these.

    A part is removed only if it is bad at two looks, the second by a store opened anew, so that an error of a disk or a network
    that passes costs nothing. A part that could not be read at either look is never removed. A part is made invisible atomically
    before it is deleted, so that an interrupted repair leaves no incomplete part.

    Args:
        looked: called after the first look at each part.

    Raises:
        StoreError: no part fits the store's tables, so the tables are what is wrong; nothing is removed.
        StoreUnreadable: the store or its list of parts could not be read. RunError: an object store cannot be reached, or a part
            could not be removed.
    """
    first = []
    for found_in_part in verify(store):
        first.append(found_in_part)
        looked()
    judged = [findings for _, findings in first if not (findings and findings[0].unreadable)]
    if judged and all(findings and findings[0].other_tables for findings in judged):
        raise StoreError(
            f"no part of {store.path} was encoded with its tables ({layout.ID_OF_RANK}, {layout.STEP}, {layout.MEAN}): these are "
            "not what was written; restore them. Nothing was removed"
        )
    found = Repair([], [], [])
    for part, findings in first:
        if findings and not findings[0].unreadable:
            findings = _findings(TeacherStore(store.path), part)
            if not findings:
                found.recovered.append(part)
        if findings and findings[0].unreadable:
            found.unreadable.extend(findings)
        elif findings:
            _remove(store, part)
            found.dropped.append(part)
    return found


def _remove(store: TeacherStore, part: int) -> None:
    try:
        store.storage.remove_part(part)
    except (OSError, MemoryError) as error:
        where = store.storage.uri_of(paths.part_key(part))
        raise RunError(
            f"cannot remove {where}, which is damaged: {str(error) or 'not enough memory'}; mend the folder and run repair again"
        ) from error


def _findings(store: TeacherStore, part: int) -> list[Finding]:
    """Return what is wrong with a part: damage, or that it could not be read."""
    try:
        return [Finding(part, message) for message in _problems(store, part)]
    except OtherTables as error:
        return [Finding(part, str(error), other_tables=True)]
    except StoreUnreadable as error:
        return [Finding(part, str(error), unreadable=True)]
    except MemoryError as error:
        where = store.storage.uri_of(paths.part_key(part))
        return [Finding(part, str(unreadable(where, error)), unreadable=True)]


def _problems(store: TeacherStore, part: int) -> Iterator[str]:
    try:
        entry = store.part_entry(part)
        yield from _file_problems(store.storage, paths.part_key(part), entry["files"])
        yield from _payload_problems(store.part_payload(part), store.manifest, store.hidden_steps)
    except OtherTables:
        raise
    except (StoreError, FileNotFoundError) as error:
        yield str(error)


def _file_problems(storage: Storage, part_key: str, listed: dict[str, dict[str, object]]) -> Iterator[str]:
    for name, expected in listed.items():
        if layout.digest_bytes(storage.read(f"{part_key}/{name}")) != expected["blake2b"]:
            yield f"{storage.uri_of(f'{part_key}/{name}')} is not what was written: its digest differs"
    for extra in sorted(storage.file_sizes(part_key).keys() - listed.keys() - {MARKER}):
        yield f"{storage.uri_of(f'{part_key}/{extra}')} does not belong to the part"


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
    if payload.visual_advantage is not None:
        checks["a visual advantage is not finite"] = ~np.isfinite(payload.visual_advantage)
    if payload.hidden is not None:
        checks["a hidden state is not finite"] = ~np.isfinite(payload.hidden).all(-1)
        if steps is not None:
            furthest = (LARGEST_STEP_COUNT + 1) * steps.step
            checks["a hidden state lies too many steps from the mean"] = (
                np.abs(payload.hidden - steps.mean) > furthest
            ).any(-1)
    for what, wrong in checks.items():
        if wrong.any():
            yield f"{what} ({int(wrong.sum())} of {counted(len(wrong), 'position')})"


def _slack(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the tolerance for values of this size: the error of float32 sums plus that of rounded statistics."""
    return (1e-5 * np.abs(values) + 2 / STAT_STEPS).astype(np.float32)
