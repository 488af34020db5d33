"""The manifest: describes a store's teacher, data and codec; two manifests are compared by their identity."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from switchkd.errors import StoreError, StoreMismatch
from switchkd.stores import layout
from switchkd.stores.layout import FORMAT, VERSION, digest_bytes


def _checksum(data: dict[str, Any]) -> str:
    return digest_bytes(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


# Name of each field in error messages.
_WORDS = {
    "payload": "payload",
    "top_k": "k",
    "fine": "finest step",
    "coarse": "coarsest step",
    "hidden_dtype": "dtype of hidden states",
    "hidden_width": "width of hidden states",
    "vocab_rows": "vocabulary rows",
    "samples": "number of samples",
    "part_size": "part size",
    "teacher": "teacher",
    "tokenizer": "tokenizer",
    "template": "template",
    "image_processor": "image processor",
    "image_tokens": "tokens per image",
    "max_length": "maximum length",
    "max_image_pixels": "maximum image pixels",
    "data": "data file",
    "statuses": "sample statuses",
}


@dataclass(frozen=True)
class Manifest:
    """Identity of a store. Two writers may fill one store only if all fields but `written_by` are equal."""

    payload: str  # "topk", "hidden" or "both"
    top_k: int  # K; 0 without topk
    fine: float  # smallest and largest quantisation step of a logit, see codec.py; 0 without topk
    coarse: float
    hidden_dtype: str  # "" without hidden
    hidden_width: int  # d; 0 without hidden
    vocab_rows: int  # N
    samples: int
    part_size: int  # samples per part
    teacher: dict[str, str]  # hashes: config, vision, projector, language; and the dtype in which it ran
    tokenizer: str
    template: dict[str, str]
    image_processor: str
    image_tokens: int
    max_length: int
    max_image_pixels: int
    data: str  # hash of the data file
    statuses: dict[str, str]  # number → name, of `samples/status`
    written_by: dict[str, str]  # software versions and backend; not part of the identity

    @property
    def part_count(self) -> int:
        """Number of parts of the whole store."""
        return -(-self.samples // self.part_size)

    def part_samples(self, part: int) -> range:
        """Return the sample indices of one part."""
        first = part * self.part_size
        return range(first, min(first + self.part_size, self.samples))

    @property
    def image_mode(self) -> str:
        """How images were made square: "own", "square" or "pad"; "own" (the checkpoint's way) if the store does not record it."""
        return self.written_by.get("image_mode", "own")

    @property
    def has_topk(self) -> bool:
        """Whether top-k logits are kept."""
        return self.payload in ("topk", "both")

    @property
    def has_hidden(self) -> bool:
        """Whether final hidden states are kept."""
        return self.payload in ("hidden", "both")

    @property
    def position_arrays(self) -> list[str]:
        """Names of the arrays that have a row for every position."""
        names = [layout.STATS]
        names += [layout.GAP, layout.HEIGHT, layout.BOTTOM] if self.has_topk else []
        names += [layout.STATE] if self.has_hidden else []
        return names + ([layout.SCALE] if self.has_hidden and self.hidden_dtype == "int8" else [])

    @property
    def identity(self) -> str:
        """Hash of all fields but `written_by`; every part records it."""
        return _checksum({name: getattr(self, name) for name in _WORDS})

    def as_attributes(self) -> dict[str, Any]:
        """Return the manifest as JSON data, as the root group's attributes keep it; `checksum` covers the rest."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return data | {"checksum": _checksum(data)}

    @classmethod
    def from_attributes(cls, data: Any, where: str) -> Self:
        """Read a manifest; `where` names the store in errors.

        Raises:
            StoreError: not a manifest, written by a newer format, or fields missing.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StoreError(f"{where} is a Zarr group but not a teacher store (no {FORMAT!r} manifest)")
        if data.get("version") != VERSION:
            raise StoreError(
                f"{where} has format version {data.get('version')}, this switchkd reads version {VERSION}; "
                "use the switchkd that wrote it, or cache again"
            )
        names = {field.name for field in fields(cls)}
        if missing := sorted(names - data.keys()):
            raise StoreError(f"the manifest of {where} lacks {', '.join(missing)}; it was damaged after writing")
        if data.get("checksum") != _checksum({name: value for name, value in data.items() if name != "checksum"}):
            raise StoreError(
                f"the manifest of {where} is not what was written: its checksum differs; restore its zarr.json"
            )
        return cls(**{name: data[name] for name in names})

    def mismatches(self, wanted: dict[str, Any]) -> list[str]:
        """Return one line for each wanted field whose value differs in this store; a dict is compared at the wanted keys."""
        lines = []
        for name, theirs in wanted.items():
            word, mine = _WORDS[name], getattr(self, name)
            if isinstance(theirs, dict):
                keys = [key for key in theirs if mine.get(key) != theirs[key]]
                lines += [f"{word} {key}: store {mine.get(key)!r}, here {theirs[key]!r}" for key in keys]
            elif mine != theirs:
                lines.append(f"{word}: store {mine!r}, here {theirs!r}")
        return lines

    def check_same(self, other: "Manifest", where: str) -> None:
        """Raise StoreMismatch, naming every field, if `other` does not have the identity of this store."""
        if lines := self.mismatches({name: getattr(other, name) for name in _WORDS}):
            raise StoreMismatch(
                f"{where} was begun with other settings:\n  " + "\n  ".join(lines) + "\n"
                "Use the settings it was begun with, or another --out"
            )
