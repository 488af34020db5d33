"""A part's own record, its attribute `switchkd_part`, and what the manifest and the record say of the part's arrays."""

import re
from datetime import UTC, datetime
from typing import Any

import numpy as np

from switchkd.stores import layout
from switchkd.stores.checks import mapping, text, whole
from switchkd.stores.manifest import Manifest

FILE_BYTES = 1 << 48
_DIGEST = re.compile(r"[0-9a-f]{16}")
_CHECKSUMS = re.compile(r"(?:[0-9a-f]{8})+")
# A name's words may not be `.` or `..`, and the name begins with a word: it stays below the part's folder on every system.
_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]+(?:/(?!\.)[A-Za-z0-9_.-]+)*")
_Fixed = tuple[tuple[int, ...], tuple[np.dtype[Any], ...]]


class NotThePart(ValueError):
    """A record is well formed, but of another part."""


def check_record(record: Any, number: int, manifest: Manifest) -> dict[str, Any]:
    """Return a part's record after checking the types and ranges of all its fields, once and before anything is done with them.

    Raises:
        NotThePart: it is the record of another part, or of a part with another number of samples.
        ValueError: a field is missing, of another type, or out of its range; says what was expected and found.
    """
    found = mapping(record, layout.PART_KEY)
    samples = len(manifest.part_samples(number))
    for name, expected in (("part", number), ("samples", samples)):
        if type(found.get(name)) is not int or found[name] != expected:
            raise NotThePart
    text(found.get("store"), "store")
    if "tables" in found:
        text(found["tables"], "tables")
    whole(found.get("positions"), "positions", 0, samples * manifest.max_length)
    if "files" not in found:
        raise ValueError("does not list its files")
    for name, about in mapping(found["files"], "files").items():
        _check_file(name, about)
    return found


def _check_file(name: str, about: Any) -> None:
    if not _NAME.fullmatch(text(name, "a file's name")):
        raise ValueError(f"lists a file {name!a:.60}, which is not a path below the part's folder")
    whole(mapping(about, name).get("bytes"), f"bytes of {name}", 0, FILE_BYTES)
    if not _DIGEST.fullmatch(text(about.get("blake2b"), f"blake2b of {name}")):
        raise ValueError(f"blake2b of {name} is not a digest")
    if "crc32c" in about and not _CHECKSUMS.fullmatch(text(about["crc32c"], f"crc32c of {name}")):
        raise ValueError(f"crc32c of {name} is not a list of checksums")


def commit_of(record: dict[str, Any]) -> tuple[str, datetime]:
    """Return who committed a part and when, from its record. Raises ValueError: it does not say."""
    written = mapping(record.get("written"), "written")
    try:
        return text(written.get("by"), "by"), datetime.fromisoformat(text(written.get("at"), "at")).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"at: {error}") from error


def array_form(name: str, manifest: Manifest, samples: int, positions: int) -> _Fixed:
    """Return the shape of an array of a part, and the types that it may have."""
    width, top_k = manifest.hidden_width, manifest.top_k
    states = {"steps": (np.int16, np.int32), "float16": (np.float16,), "bfloat16": (np.uint16,), "int8": (np.int8,)}
    forms: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
        layout.OFFSET: ((samples + 1,), (np.int64,)),
        layout.DIGEST: ((samples, len(layout.DIGEST_COLUMNS)), (np.uint64,)),
        layout.STATUS: ((samples,), (np.uint8,)),
        layout.TOKENS: ((samples,), (np.uint32,)),
        layout.STATS: ((positions, len(layout.STAT_COLUMNS)), (np.float32,)),
        layout.VISUAL_ADVANTAGE: ((positions,), (np.float16,)),
        layout.GAP: ((positions, top_k), (layout.rank_dtype(manifest.vocab_rows),)),
        layout.HEIGHT: ((positions, top_k), (np.uint16,)),
        layout.BOTTOM: ((positions,), (np.uint16,)),
        layout.ORDER: ((positions,), (np.uint16,)),
        layout.STATE: ((positions, width), states.get(manifest.hidden_dtype, ())),
        layout.SCALE: ((positions, -(-width // layout.INT8_BLOCK)), (np.float16,)),
    }
    shape, types = forms[name]
    return shape, tuple(np.dtype(of) for of in types)
