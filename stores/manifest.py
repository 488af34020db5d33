"""The manifest: what a store says about its teacher, its data and its codec, and how two of them are compared."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from switchkd.errors import StoreError, StoreMismatch
from switchkd.stores.layout import FORMAT, VERSION

# Word for each field in an error message.
_WORDS = {
    "payload": "payload",
    "top_k": "k",
    "step": "quantisation step",
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
}


@dataclass(frozen=True)
class Manifest:
    """Identity of a store. Two writers may fill one store only if all fields but `written_by` are equal."""

    payload: str
    top_k: int  # K
    step: float  # logits per quantisation step
    vocab_rows: int  # N
    samples: int
    part_size: int  # samples per part
    teacher: dict[str, str]  # hashes: config, vision, projector, language; and the dtype it ran in
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

    def as_attributes(self) -> dict[str, Any]:
        """Return the manifest as JSON data, as the root group's attributes keep it."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

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
        return cls(**{name: data[name] for name in names})

    def misfits(self, wanted: dict[str, Any]) -> list[str]:
        """Return one line for each wanted field that this store has otherwise; a dict is compared at the wanted keys."""
        lines = []
        for name, theirs in wanted.items():
            word, mine = _WORDS[name], getattr(self, name)
            if isinstance(theirs, dict):
                keys = [key for key in theirs if mine.get(key) != theirs[key]]
                lines += [f"{word} {key}: store {mine.get(key)!r}, here {theirs[key]!r}" for key in keys]
            elif mine != theirs:
                lines.append(f"{word}: store {mine!r}, here {theirs!r}")
        return lines

    def require_same(self, other: "Manifest", where: str) -> None:
        """Raise StoreMismatch, naming every field, if `other` has not the identity of this store."""
        if lines := self.misfits({name: getattr(other, name) for name in _WORDS}):
            raise StoreMismatch(
                f"{where} was begun with other settings:\n  " + "\n  ".join(lines) + "\n"
                "Use the settings it was begun with, or another --out"
            )
