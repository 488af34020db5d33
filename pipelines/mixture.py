"""Mixture files: several data files as the training data of one run, each with its images, its share and its store.

    - data: llava_v1_5_mix665k.json
      images: images/
    - data: charts.parquet
      weight: 2

A mixture is given where a data file is given. Reading one imports no torch, and opens none of the files that it names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from switchkd.errors import ConfigError, SwitchKDError
from switchkd.pipelines.options import fields_of, option, options_class, value_of_option
from switchkd.printable import printable
from switchkd.settings import StoreLocation, is_mixture

MAX_WEIGHT = 1000.0
NOT_IN_NAMES = frozenset("/\\:\t\n")  # the name is that of a folder
_DATA_ENDINGS = (".json", ".jsonl", ".parquet", ".arrow")


@options_class
class MixtureEntry:
    """One data file of a mixture; the keys of an entry of the YAML list.

    Raises:
        ConfigError: a key violates its type or bounds, or two keys exclude each other.
    """

    data: Path = option(help="A data file, as --data takes it.")
    name: str = option(default="", help="Of the entry in messages, and of its store.", unset="the data file's")
    images: Path | None = option(
        default=None, help="Folder that the data file's image paths start from.", unset="--images"
    )
    template: str | None = option(default=None, help="Conversation template of this data file.", unset="--template")
    weight: float | None = option(
        default=None, above=0, at_most=MAX_WEIGHT, help="Passes over the data file in an epoch.", unset="1"
    )
    cap: int | None = option(
        default=None, at_least=1, help="Samples of an epoch, at most.", unset="as many as there are"
    )
    store: StoreLocation | None = option(
        default=None, help="Its teacher store.", unset="NAME.zarr in the folder of --out or --cache"
    )
    teacher: Path | None = option(
        default=None,
        help="Checkpoint folder of the teacher of its store; training without --switch.",
        unset="--teacher",
    )

    def __post_init__(self) -> None:
        if self.weight is not None and self.cap is not None:
            raise ConfigError("weight and cap both say how many samples an epoch has: give one of them")
        if (
            not self.name
            or self.name.startswith(".")
            or printable(self.name) != self.name
            or set(self.name) & NOT_IN_NAMES
        ):
            raise ConfigError(
                f"name {printable(self.name)!r} cannot be that of a store: give a `name` without slashes and colons"
            )

    def drawn(self, usable: int) -> int:
        """Return how many samples of this data file an epoch has, of `usable` that can be used; at least 1 of these."""
        if self.cap is not None:
            return min(self.cap, usable)
        return max(min(1, usable), round((1.0 if self.weight is None else self.weight) * usable))

    def share(self) -> str:
        """Return weight or cap in words; "" where neither is given."""
        if self.cap is not None:
            return f"cap {self.cap:,}"
        return "" if self.weight is None else f"weight {self.weight:g}"


@dataclass(frozen=True)
class Mixture:
    """A mixture file, read and checked by itself."""

    path: Path
    entries: tuple[MixtureEntry, ...]

    @contextmanager
    def naming(self, entry: MixtureEntry) -> Iterator[None]:
        """Name the entry in every error that is raised on purpose."""
        try:
            yield
        except SwitchKDError as error:
            error.args = (f"{printable(self.path)}, entry {entry.name}: {error}", *error.args[1:])
            raise

    def store_of(self, entry: MixtureEntry, folder: StoreLocation) -> StoreLocation:
        """Return where the store of an entry lies: at its own `store`, or as NAME.zarr in a folder (or below a URL) of stores."""
        if entry.store is not None:
            return entry.store
        name = f"{entry.name}.zarr"
        return Path(folder) / name if "://" not in str(folder) else f"{str(folder).rstrip('/')}/{name}"


def mixture_at(path: Path) -> Mixture | None:
    """Return the mixture at a path given as data; None if it is one data file.

    Raises:
        ConfigError: see `read_mixture`.
    """
    return read_mixture(path) if is_mixture(path) else None


def read_mixture(path: Path) -> Mixture:
    """Read a mixture file: a YAML list of entries, whose keys are the fields of `MixtureEntry`.

    Raises:
        ConfigError: not such a list, an unknown key, a value out of bounds, or two entries with one name, data file or store.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"the mixture {printable(path)} cannot be read: {printable(error, 300)}") from None
    if not isinstance(content, list) or not content:
        raise ConfigError(
            f"the mixture {printable(path)} should be a list of entries, as `- data: FILE`, found "
            + ("an empty list" if content == [] else type(content).__name__)
        )
    entries = []
    for number, given in enumerate(content, 1):
        try:
            entries.append(_entry(given))
        except ConfigError as error:
            about = given.get("name") or given.get("data") if isinstance(given, dict) else None
            named = f" ({printable(about, 100)})" if about is not None else ""
            raise ConfigError(f"{printable(path)}, entry {number}{named}: {error}") from None
    _require_different(path, entries)
    return Mixture(path, tuple(entries))


def _entry(given: Any) -> MixtureEntry:
    known = fields_of(MixtureEntry)
    if not isinstance(given, dict):
        raise ConfigError(f"expected keys and values, as `data: FILE`, found {printable(repr(given), 100)}")
    if unknown := [key for key in given if key not in known]:
        raise ConfigError(f"no key {printable(unknown[0], 60)!r}; there are {', '.join(known)}")
    if given.get("data") is None:
        raise ConfigError("the key data is needed: the path of a data file")
    values = {key: value_of_option(MixtureEntry, key, value) for key, value in given.items() if value is not None}
    if is_mixture(values["data"]):
        raise ConfigError(f"{printable(values['data'])} is a mixture itself: list its entries here")
    if not values.get("name"):
        data = values["data"]
        values["name"] = data.stem if data.suffix.lower() in _DATA_ENDINGS else data.name
    entry = MixtureEntry(**values)
    location = entry.store
    return replace(entry, store=Path(location)) if location is not None and "://" not in str(location) else entry


def _require_different(path: Path, entries: list[MixtureEntry]) -> None:
    """Raise ConfigError for two entries with one data file, name or store."""
    kinds: dict[str, tuple[Callable[[MixtureEntry], Any], str]] = {
        "data file": (lambda e: e.data.resolve(), "list it once: `weight: 2` takes each of its samples twice"),
        "name": (lambda e: e.name, "stores are named by it: give one of them another `name`"),
        "store": (lambda e: e.store and str(e.store).rstrip("/"), "a store belongs to one data file"),
    }
    for what, (of, advice) in kinds.items():
        seen: dict[Any, int] = {}
        for number, entry in enumerate(entries, 1):
            value = of(entry)
            if value is None:
                continue
            if value in seen:
                raise ConfigError(
                    f"{printable(path)}, entries {seen[value]} and {number} have the same {what} "
                    f"{printable(value)}: {advice}"
                )
            seen[value] = number


def require_folder_of_stores(out: StoreLocation, data: Path) -> None:
    """Raise ConfigError if `out` is the name of one store, where the stores of a mixture are to lie."""
    if PurePosixPath(str(out)).suffix == ".zarr":
        raise ConfigError(
            f"{printable(data)} is a mixture, whose entries have a store each: --out takes the folder of the stores, got {out}"
        )
