"""Fingerprints: short hashes of samples, configs, tokenizers and model components, so that an error can name what differs."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from switchkd.collector import without_collection
from switchkd.errors import CheckpointError
from switchkd.printable import printable
from switchkd.waits import Waiting

# Keys of a config or processor that describe its origin, not what it computes.
_NOT_IDENTITY = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "processor_class",
    "auto_map",
    "use_cache",
}
# Keys that one version of transformers writes for another's (5.24 and 5.19 for Idefics3 and SmolVLM): one identity for both.
_RENAMED = {"_pad_token_id": "pad_token_id"}


class SampleDigest(NamedTuple):
    """Digest of a sample: three hashes, so that an error can name what changed."""

    input_ids: int
    supervised: int  # the mask
    image: int  # the image file's bytes, and how they are decoded; 0 for text only

    def differing(self, other: "SampleDigest") -> list[str]:
        """Return the names of the fields that differ, as used in error messages."""
        words = {"input_ids": "text", "supervised": "supervised mask", "image": "image"}
        return [word for field, word in words.items() if getattr(self, field) != getattr(other, field)]


# Of the BLAKE2b hash of images that versions of switchkd before `data.to_rgb` gave other pixels.
_DECODED_OTHERWISE = b"switchkd-rgb-2"


def digest_sample(
    input_ids: NDArray[np.int32], supervised: NDArray[np.bool_], image: bytes | None, decoded_otherwise: bool = False
) -> SampleDigest:
    """Digest one encoded sample, 64 bits (BLAKE2b) per field.

    Args:
        image: the image file's bytes. decoded_otherwise: whether earlier versions gave it other pixels; its digest is then another,
            so that a store made by them does not fit, while stores of ordinary images do.
    """
    return SampleDigest(
        _hash64(np.ascontiguousarray(input_ids, dtype="<i4").tobytes()),
        _hash64(np.packbits(supervised).tobytes() + len(supervised).to_bytes(8, "little")),
        _hash64(image, _DECODED_OTHERWISE if decoded_otherwise else b"") if image is not None else 0,
    )


def _hash64(data: bytes, person: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=person).digest(), "little")


def hash_json(data: Any) -> str:
    """Hash plain data, independent of key order; 16 hex digits."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_config(config: dict[str, Any]) -> str:
    """Hash a model's config without the keys that do not change what it computes."""
    return hash_json(_without_provenance(config))


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _NOT_IDENTITY}
        return {_RENAMED.get(key, key): _without_provenance(item) for key, item in kept.items()}
    return value


# Digest of a tokenizer's content → its hash. A vocabulary of 150,000 entries takes half a second to put into order, and one command
# hashes the tokenizers of teacher and student, which are equal as a rule, several times.
_KNOWN_TOKENIZERS: dict[bytes, str] = {}


# Tokenizers whose hash was taken before a processor got them. PaliGemma's changes the tokenizer that it is given, and the hash must
# not depend on whether a command has opened the processor already.
_AS_SAVED: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def pin_tokenizer(tokenizer: Any) -> None:
    """Keep the hash of a tokenizer as it is now; `hash_tokenizer` returns it from here on, whatever is done to the tokenizer."""
    if tokenizer not in _AS_SAVED:
        _AS_SAVED[tokenizer] = hash_tokenizer(tokenizer)


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash everything that determines a fast tokenizer's ids: vocabulary, merges, normalisation, added and special tokens."""
    if (pinned := _AS_SAVED.get(tokenizer)) is not None:
        return pinned
    text = tokenizer.backend_tokenizer.to_str()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = hashlib.blake2b(f"{json.dumps(special)} {text}".encode()).digest()
    if content not in _KNOWN_TOKENIZERS:
        with without_collection():
            backend = json.loads(text)
            for state in ("truncation", "padding"):  # changed by earlier calls
                backend.pop(state, None)
            _KNOWN_TOKENIZERS[content] = hash_json([backend, special])
    return _KNOWN_TOKENIZERS[content]


def hash_image_processor(processor: Any) -> str:
    """Hash an image processor: its class (backends differ in the last bits of a pixel) and its settings."""
    settings = {key: value for key, value in processor.to_dict().items() if value is not None}
    return hash_json([type(processor).__name__, _without_provenance(settings)])


def hash_weights(
    folder: str | Path, components: tuple[str, ...] = ("vision", "projector", "language")
) -> dict[str, str]:
    """Hash a checkpoint's weights per component, from the bytes on disk, without building the model.

    Args:
        folder: holds safetensors files. components: those to read; the bytes of others are not read, and may be absent.

    Returns:
        component → hash over its tensors' names, dtypes, shapes and bytes (independent of their distribution over files).

    Raises:
        CheckpointError: see `weight_files`; or a file that is cut short.
    """
    files = weight_files(folder, components)
    tensors: dict[str, list[tuple[str, str]]] = {component: [] for component in components}
    sizes = [path.stat().st_size for path in files]
    with Waiting(f"hashing the weights of {printable(folder)}, {sum(sizes) / 1e9:,.1f} GB") as wait:
        for number, path in enumerate(files):
            for name, entry, digest in _tensor_hashes(path, components):
                tensors[component_of(name)].append((name, f"{entry.get('dtype')} {entry['shape']} {digest}"))
                wait.share = (sum(sizes[:number]) + int(entry["data_offsets"][1])) / sum(sizes)
    return {component: hash_json(sorted(found)) for component, found in tensors.items()}


MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: str | Path, components: tuple[str, ...] = ("vision", "projector", "language")) -> list[Path]:
    """Return the safetensors files of a checkpoint's weights, in order of their names: those that transformers loads.

    That is `model.safetensors`, else the files that `model.safetensors.index.json` names. A folder may hold others, such as an
    adapter or the weights in a second format, which are not the model's.

    Args:
        components: of an index, only files with tensors of these are returned; others may be absent.

    Raises:
        CheckpointError: neither file, an index that is damaged, or a file that it names and that is missing.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}: other weight formats, or names, are not read"
        )
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in named.items() if component_of(name) in components})
        strange = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} does not say where weights are: {error!r}; copy it again") from None
    if strange or not files:
        raise CheckpointError(f"{index} names {strange[0] if strange else 'no file'}: not a checkpoint's safetensors")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX_FILE} names, the first is {missing[0]}; "
            "copy it again"
        )
    return [folder / file for file in files]


# What names of tensors contain in transformers' families. Towers of the Qwen line hold modules of the projector, so it comes first.
_OF_PROJECTOR = (
    "multi_modal_projector",
    "connector.",
    "image_newline",
    "visual.merger",
    "visual.deepstack_merger_list",
    "visual.post_layernorm",
    "visual.downsample",
)
_OF_VISION = ("vision_tower", "visual.", "vision_model.")


def component_of(tensor_name: str) -> str:
    """Return which of a VLM's three components a tensor or parameter belongs to, by its name: vision, projector or language."""
    if any(word in tensor_name for word in _OF_PROJECTOR):
        return "projector"
    return "vision" if any(word in tensor_name for word in _OF_VISION) else "language"


def _tensor_hashes(path: Path, components: tuple[str, ...]) -> Any:
    """Yield (name, header entry, hash of the bytes) of a safetensors file's tensors in these components."""
    with path.open("rb") as file:
        try:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_bytes, MAX_HEADER_BYTES)))
            header.pop("__metadata__", None)
            spans = {name: (entry, *map(int, entry["data_offsets"])) for name, entry in header.items()}
            size = os.fstat(file.fileno()).st_size - 8 - header_bytes
            strange = [
                name for name, (entry, begin, end) in spans.items() if not 0 <= begin <= end or "shape" not in entry
            ]
        except (
            struct.error, ValueError, MemoryError, OverflowError, AttributeError, TypeError, KeyError, RecursionError,
        ) as error:  # fmt: skip
            raise CheckpointError(f"{path} is not a safetensors file: {error!r}; copy it again") from None
        if strange:
            raise CheckpointError(f"{path} is damaged at tensor {printable(strange[0], 100)}; copy it again")
        for name, (entry, begin, end) in spans.items():
            if component_of(name) not in components:
                continue
            if end > size:
                raise CheckpointError(f"{path} is cut short inside tensor {printable(name, 100)}; copy it again")
            file.seek(8 + header_bytes + begin)
            data = file.read(end - begin)
            yield name, entry, hashlib.blake2b(data, digest_size=8).hexdigest()
