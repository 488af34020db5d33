"""The results of inspecting samples, kept between commands: `data check` and training share them, a survey can be interrupted.

They lie in the cache of rows, in a folder named by everything that a result depends on: the data file's content, the image folder,
tokenizer, template, image processor, limits, and the code and libraries that inspect. Only image files can change under that name:
each row keeps a stamp of its image (size, times, inode), and a row whose stamp differs is inspected anew.

A block holds rows from all over the data file: block b of n the rows b, b + n, b + 2n, …. So the first one is a sample of the file.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import switchkd
from switchkd.data.dataset_files import ENDINGS, data_files, identity_of
from switchkd.data.row_cache import cache_folder
from switchkd.data.samples import Sample, SampleFile, Status
from switchkd.fingerprints import hash_image_processor, hash_json, hash_tokenizer
from switchkd.pipelines.preflight.inspector import Finding, SampleInspector
from switchkd.printable import printable

BLOCK_ROWS = 1024
# An image file changed within this time before its stamp was taken could change again under the same stamp: clocks of file systems
# tick up to every two seconds.
TICK_SECONDS = 2.0
NO_STAMP = ""  # never equal to a stamp: the row is inspected again
_LIBRARIES = ("pillow", "tokenizers", "transformers", "numpy")
log = logging.getLogger(__name__)


class Stamped(NamedTuple):
    """A finding, and the stamp that the sample's image had before it was read."""

    finding: Finding
    stamp: str


class KeptFindings:
    """The findings about a data file's rows in blocks, in files; see the module's docstring.

    Args:
        samples: the data file. inspector: what inspects them.
    """

    def __init__(self, samples: SampleFile, inspector: SampleInspector) -> None:
        self.samples, self.inspector = samples, inspector
        self.blocks = -(-len(samples) // BLOCK_ROWS)
        # Without a tokenizer and without images, nothing is done that is worth keeping.
        self.folder = None
        if inspector.encoder is not None or inspector.images is not None or not samples.needs_folder():
            self.folder = cache_folder("surveys") / _key(samples, inspector)

    def rows(self, block: int) -> range:
        """Return the rows of a block."""
        return range(block, len(self.samples), self.blocks)

    def read(self, block: int) -> dict[int, Stamped]:
        """Return what is known about a block's rows; without those whose image may have changed. Empty if nothing is kept."""
        if self.folder is None:
            return {}
        try:
            entries = _checked(block, (self.folder / f"{block:06d}.json").read_text(encoding="utf-8"))
            found = [Stamped(_finding(*entry[:-1]), str(entry[-1])) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        rows = self.rows(block)
        if len(found) != len(rows):
            return {}
        here = dict(zip(rows, found, strict=True))
        return {row: known for row, known in here.items() if known.stamp == self.stamp(self.samples[row]) != NO_STAMP}

    def write(self, block: int, findings: dict[int, Stamped]) -> None:
        """Keep the findings about all rows of a block.

        A cache that cannot be written costs the next command its time, and nothing else.
        """
        if self.folder is None:
            return
        text = json.dumps([[*_plain(findings[row].finding), findings[row].stamp] for row in self.rows(block)])
        path = self.folder / f"{block:06d}.json"
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(f"{_digest(block, text)}\n{text}", encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            log.warning("what was found about samples cannot be kept in %s: %s", printable(self.folder), error)
            self.folder = None

    def stamp(self, sample: Sample) -> str:
        """Return what tells whether a sample's image file is the same as before; equal for all rows without such a file."""
        folder = self.inspector.images
        files = [image.name for image in sample.images if image.embedded is None]
        if folder is None or not files:
            return "none"
        stamps = [_stamp_of(folder / name.replace("\\", "/")) for name in files]
        return NO_STAMP if NO_STAMP in stamps else "/".join(stamps)


def _stamp_of(file: Path) -> str:
    try:
        about = os.stat(file)
    except (OSError, ValueError):
        return "missing"
    if time.time() - max(about.st_mtime, about.st_ctime) < TICK_SECONDS:
        return NO_STAMP
    return f"{about.st_size}-{about.st_mtime_ns}-{about.st_ctime_ns}-{about.st_ino}-{about.st_dev}"


def _key(samples: SampleFile, inspector: SampleInspector) -> str:
    """Return the hash of everything but the image files that findings depend on."""
    path = samples.path
    images = None if inspector.images is None else str(inspector.images.resolve())
    about: dict[str, Any] = {"data": samples.fingerprint, "images": images, "pixels": inspector.max_image_pixels}
    if path.is_dir() or path.suffix.lower() in ENDINGS:  # whose fingerprint leaves out the images that it holds
        about["files"] = identity_of(data_files(path))
    if (encoder := inspector.encoder) is not None:
        about |= {
            "tokenizer": hash_tokenizer(encoder.tokenizer),
            "processor": hash_image_processor(encoder.reader.image_processor),
            "template": encoder.template.as_dict(),
            "image": encoder.placeholder()[0].tolist(),  # what its processor's settings make of one
            "max_length": encoder.max_length,
        }
    return hash_json([about, _code()])


@cache
def _code() -> list[str]:
    """Return the versions of what inspects samples: libraries, and the source of the modules that do it."""
    digest = hashlib.sha256()
    own = [*sorted((Path(switchkd.__file__).parent / "data").glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    for file in own:
        digest.update(file.read_bytes())
    return [digest.hexdigest(), *(importlib.metadata.version(name) for name in _LIBRARIES)]


def _plain(found: Finding) -> list[Any]:
    return [int(found.status), found.detail, found.tokens, found.positions, list(found.notes), list(found.conversions)]


def _finding(status: int, detail: str, tokens: int, positions: int, notes: list[str], kinds: list[str]) -> Finding:
    return Finding(Status(status), detail, int(tokens), int(positions), tuple(notes), tuple(kinds))


def _digest(block: int, text: str) -> str:
    return hashlib.blake2b(f"{block} {text}".encode(), digest_size=16).hexdigest()


def _checked(block: int, text: str) -> list[Any]:
    """Return the entries of a block's file. Raises ValueError if it is not what was written."""
    digest, _, body = text.partition("\n")
    if digest != _digest(block, body):
        raise ValueError("damaged")
    entries: list[Any] = json.loads(body)
    return entries
