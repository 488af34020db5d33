"""The manifest: describes a store's teacher, data and codec; two manifests are compared by their identity."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from switchkd.errors import StoreError, StoreMismatch
from switchkd.stores import layout
from switchkd.stores.check_manifest import check_manifest
from switchkd.stores.layout import FORMAT, VERSION, VERSIONS, digest_bytes


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
    "hidden_error": "error of hidden states",
    "stats_dtype": "dtype of statistics",
    "visual_advantage": "blur of the visual advantage (0: none is stored)",
}
# Fields that stores of version 1 do not have. Their identity, which their parts record, leaves these out.
_SINCE_2 = ("hidden_error", "stats_dtype")
# Fields that a manifest has only if they are not 0, and that identities leave out: what they describe is beside the rest, which is
# the same without, and a reader that does not know them reads it.
_OPTIONAL = ("visual_advantage",)


@dataclass(frozen=True)
class Manifest:
    """Description of a store. Two writers may fill one store only if all fields but `written_by` and `version` are equal."""

    payload: str  # "topk", "hidden" or "both"
    top_k: int  # K; 0 without topk
    fine: float  # smallest and largest quantisation step of a logit, see codec.py; 0 without topk
    coarse: float
    hidden_dtype: str  # one of `layout.HIDDEN_DTYPES`, or "int8" in version 1; "" without hidden
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
    hidden_error: float = 0.0  # T: root-mean-square error of a logit from states stored as "steps"; 0 for other dtypes
    stats_dtype: str = (
        ""  # dtype of the logits that statistics and top-k come from; "" in version 1: that of the teacher's head
    )
    # Standard deviation of the blur by which the visual advantage of every position is defined, as a share of an image's longer
    # side; 0: none is stored.
    visual_advantage: float = 0.0
    version: int = VERSION

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
    def max_pixels(self) -> int | None:
        """The limit on the pixels of an image, `--max-pixels`; None if the checkpoint's own was used."""
        return int(self.written_by["max_pixels"]) if self.written_by.get("max_pixels") else None

    @property
    def has_topk(self) -> bool:
        """Whether top-k logits are kept."""
        return self.payload in ("topk", "both")

    @property
    def has_hidden(self) -> bool:
        """Whether final hidden states are kept."""
        return self.payload in ("hidden", "both")

    def describe(self, payload: str) -> str:
        """Return one payload of the store, "topk" or "hidden", in words."""
        if payload == "topk":
            return f"topk: {self.top_k:,} of {self.vocab_rows:,} logits, quantisation steps {self.fine:g} to {self.coarse:g}"
        how = f"steps of logit error {self.hidden_error:g}" if self.hidden_dtype == "steps" else self.hidden_dtype
        return f"hidden: {self.hidden_width:,} wide states as {how}, knees {'stored' if self.has_exact_knee else 'found again'}"

    def describe_all(self) -> str:
        """Return what the store keeps, in words."""
        kept = [name for name, there in (("topk", self.has_topk), ("hidden", self.has_hidden)) if there]
        looking = [f"visual advantage, blur {self.visual_advantage:g}"] if self.visual_advantage else []
        return "; ".join([*map(self.describe, kept), *looking])

    @property
    def position_arrays(self) -> list[str]:
        """Names of the arrays that have a row for every position."""
        names = [layout.STATS] + ([layout.VISUAL_ADVANTAGE] if self.visual_advantage else [])
        names += [layout.GAP, layout.HEIGHT, layout.BOTTOM] if self.has_topk else []
        names += [layout.ORDER] if self.has_topk and self.version > 1 else []
        names += [layout.STATE] if self.has_hidden else []
        return names + ([layout.SCALE] if self.has_hidden and self.hidden_dtype == "int8" else [])

    @property
    def identity(self) -> str:
        """Hash of all fields but `written_by`, `version` and the optional ones; every part records it."""
        return _checksum({name: getattr(self, name) for name in self._words if name not in _OPTIONAL})

    @property
    def _words(self) -> list[str]:
        return [name for name in _WORDS if self.version > 1 or name not in _SINCE_2]

    @property
    def has_exact_knee(self) -> bool:
        """Whether the stored knee is that of float32 logits, and so better than one found on rebuilt logits."""
        return self.stats_dtype == layout.STATS_DTYPE

    def as_version(self, version: int) -> "Manifest":
        """Return the manifest that continues a store of this version."""
        return self if version == self.version else replace(self, version=version, hidden_error=0.0, stats_dtype="")

    def as_attributes(self) -> dict[str, Any]:
        """Return the manifest as JSON data, as the root group's attributes keep it; `checksum` covers the rest."""
        data = {"format": FORMAT, **asdict(self)}
        data = {name: value for name, value in data.items() if value or name not in _OPTIONAL}
        if self.version == 1:
            data = {name: value for name, value in data.items() if name not in _SINCE_2}
        return data | {"checksum": _checksum(data)}

    @classmethod
    def from_attributes(cls, data: Any, where: str) -> Self:
        """Read a manifest; `where` names the store in errors.

        Raises:
            StoreError: not a manifest, written by a newer format, fields missing, or values that no store has.
        """
        try:
            return cls._checked(data, where)
        except RecursionError:
            raise StoreError(f"the manifest of {where} is nested too deep; restore its zarr.json") from None

    @classmethod
    def _checked(cls, data: Any, where: str) -> Self:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StoreError(f"{where} is a Zarr group but not a teacher store (no {FORMAT!r} manifest)")
        if type(version := data.get("version")) is not int or version not in VERSIONS:
            raise StoreError(
                f"{where} has format version {version}, this switchkd reads versions {' and '.join(map(str, VERSIONS))}; "
                "use the switchkd that wrote it, or cache again"
            )
        names = {field.name for field in fields(cls)} - (set(_SINCE_2) if version == 1 else set())
        names -= set(_OPTIONAL) - data.keys()
        if missing := sorted(names - data.keys()):
            raise StoreError(f"the manifest of {where} lacks {', '.join(missing)}; it was damaged after writing")
        if data.get("checksum") != _checksum({name: value for name, value in data.items() if name != "checksum"}):
            raise StoreError(
                f"the manifest of {where} is not what was written: its checksum differs; restore its zarr.json"
            )
        try:
            check_manifest({name: data[name] for name in names} | {"version": version})
        except ValueError as error:
            raise StoreError(
                f"the manifest of {where} is not that of a store: {error}; restore its zarr.json"
            ) from error
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
        if lines := self.mismatches({name: getattr(other, name) for name in self._words}):
            raise StoreMismatch(
                f"{where} was begun with other settings:\n  " + "\n  ".join(lines) + "\n"
                "Use the settings it was begun with, or another --out"
            )
