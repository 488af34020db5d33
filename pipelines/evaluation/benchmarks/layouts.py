"""Where a benchmark's files are: in its publisher's layout, or in that of LLaVA's folder `playground/data/eval`.

The folder `--benchmarks` may be one with a folder for each benchmark, LLaVA's `playground/data/eval`, or the folder above that
`playground` (LLaVA, docs/Evaluation.md). Every file is looked for by itself, so the layouts may be mixed.
"""

from collections.abc import Mapping
from pathlib import Path

from switchkd.errors import DataError
from switchkd.pipelines.evaluation.benchmarks.base import Benchmark

LLAVA = Path("playground/data/eval")

Files = Mapping[str, Path]  # the publisher's name of a file or folder, as in `Split.files` → where it is


def find_files(benchmark: Benchmark, root: Path, split: str) -> Files:
    """Return where each file and folder of a split is; a name with `*` keeps it.

    Args:
        root: the folder `--benchmarks`.

    Raises:
        DataError: one of them is nowhere; names the first one and all places where it was looked for.
    """
    bases = [root, *([root / LLAVA] if (root / LLAVA).is_dir() else [])]
    found = {}
    for name in benchmark.splits[split].files:
        places = [base / place for base in bases for place in places_of(benchmark, split, name)]
        there = next((path for path in places if _exists(path, folder=name.endswith("/"))), None)
        if there is None:
            raise DataError(_missing(benchmark, split, name, places))
        found[name] = there
    return found


def places_of(benchmark: Benchmark, split: str, name: str) -> list[str]:
    """Return the paths of a file below the folder `--benchmarks`: the publisher's, then LLaVA's if it is another."""
    other = benchmark.splits[split].llava.get(name)
    return [f"{benchmark.folder}/{name}", *([other] if other else [])]


def _exists(path: Path, folder: bool) -> bool:
    return path.is_dir() if folder else any(path.parent.glob(path.name))


def _missing(benchmark: Benchmark, split: str, name: str, places: list[Path]) -> str:
    kind = "folder" if name.endswith("/") else "file"
    first, *others = places
    text = f"{benchmark.name} ({split}) needs the {kind} {first}"
    if others:
        text += f", or in LLaVA's layout {' or '.join(map(str, others))}; none is there"
    else:
        text += ", which is not there"
    return text + "; `switchkd eval --list` tells where the data can be had"
