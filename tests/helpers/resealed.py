"""Writes a store's metadata anew after a change, with the right checksums: damage that no checksum finds."""

import json
from pathlib import Path

from switchkd.stores.layout import FORMAT, MANIFEST_KEY, PART_KEY, digest_bytes
from switchkd.stores.manifest import _SINCE_2, _WORDS, _checksum
from switchkd.stores.shards import Description, checksums_of


def load(file: Path):
    return json.loads(file.read_text())


def manifest_of(store: Path) -> dict:
    return load(store / "zarr.json")["attributes"][MANIFEST_KEY]


def write_manifest(store: Path, manifest, identity: bool = True) -> None:
    """Write a manifest with its checksum, and its identity into every part, as if the store had been written so."""
    data = load(store / "zarr.json")
    if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
        manifest["checksum"] = _checksum({name: value for name, value in manifest.items() if name != "checksum"})
        names = [name for name in _WORDS if name in manifest and (manifest.get("version") != 1 or name not in _SINCE_2)]
        if identity:
            for part in (store / "parts").iterdir():
                if part.is_dir():
                    write_record(part, record_of(part) | {"store": _checksum({name: manifest[name] for name in names})})
    data["attributes"][MANIFEST_KEY] = manifest
    (store / "zarr.json").write_text(json.dumps(data))


def record_of(part: Path) -> dict:
    return load(part / "zarr.json")["attributes"][PART_KEY]


def write_record(part: Path, record) -> None:
    data = load(part / "zarr.json")
    data["attributes"][PART_KEY] = record
    (part / "zarr.json").write_text(json.dumps(data))


def reseal(part: Path, crc32c: bool = True) -> None:
    """Make a part's record list its files as they are: sizes, digests and, if they can be found, the chunks' checksums."""
    record, files = record_of(part), {}
    for file in sorted(part.rglob("*")):
        name = file.relative_to(part).as_posix()
        if file.is_file() and name != "zarr.json":
            data = file.read_bytes()
            files[name] = {"bytes": len(data), "blake2b": digest_bytes(data)}
            array = name.partition("/c/")[0]
            if crc32c and "/c/" in name and (part / array / "zarr.json").exists():
                try:
                    files[name]["crc32c"] = checksums_of(
                        Description.parse(array, (part / array / "zarr.json").read_bytes()), data
                    )
                except (ValueError, TypeError):  # no shard of this description
                    continue
    write_record(part, record | {"files": files})
