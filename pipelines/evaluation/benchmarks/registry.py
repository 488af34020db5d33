"""The benchmarks by name, in the order of the paper's Table 1, and the two averages."""

from collections.abc import Sequence

from switchkd.errors import ConfigError
from switchkd.pipelines.evaluation.benchmarks.base import Benchmark
from switchkd.pipelines.evaluation.benchmarks.emoji_vqa import EMOJI_VQA
from switchkd.pipelines.evaluation.benchmarks.gqa import GQA
from switchkd.pipelines.evaluation.benchmarks.layouts import LLAVA, places_of
from switchkd.pipelines.evaluation.benchmarks.mmbench import MMBENCH, MMBENCH_CN
from switchkd.pipelines.evaluation.benchmarks.mme import MME
from switchkd.pipelines.evaluation.benchmarks.mmmu import MMMU
from switchkd.pipelines.evaluation.benchmarks.pope import POPE
from switchkd.pipelines.evaluation.benchmarks.scienceqa import SCIENCEQA
from switchkd.pipelines.evaluation.benchmarks.vqa import TEXTVQA, TEXTVQA_NO_OCR, VIZWIZ, VQAV2

TEN = (MME, MMBENCH, MMBENCH_CN, VQAV2, GQA, SCIENCEQA, MMMU, TEXTVQA, VIZWIZ, POPE)
BENCHMARKS = {benchmark.name: benchmark for benchmark in (*TEN, TEXTVQA_NO_OCR, EMOJI_VQA)}
# Avg10 is the mean of all ten; Avg7 leaves three out (the paper's Table 1).
AVERAGES = {
    "avg7": tuple(b.name for b in TEN if b not in (VQAV2, MMMU, POPE)),
    "avg10": tuple(b.name for b in TEN),
}


def parse_tasks(names: Sequence[str]) -> list[tuple[Benchmark, str]]:
    """Read `NAME`, `NAME:SPLIT` or `all` (the ten of the paper) as benchmarks and splits.

    Raises:
        ConfigError: an unknown benchmark or split.
    """
    tasks: dict[tuple[str, str], tuple[Benchmark, str]] = {}
    for task in [task for name in names for task in (AVERAGES["avg10"] if name == "all" else (name,))]:
        benchmark_name, _, split = task.partition(":")
        benchmark = BENCHMARKS.get(benchmark_name)
        if benchmark is None:
            raise ConfigError(
                f"no benchmark {benchmark_name!r}; there are {', '.join(BENCHMARKS)}, and all for the ten"
            )
        split = split or next(iter(benchmark.splits))
        if split not in benchmark.splits:
            raise ConfigError(f"{benchmark_name} has no split {split!r}; it has {', '.join(benchmark.splits)}")
        tasks[benchmark_name, split] = benchmark, split
    return list(tasks.values())


def describe() -> str:
    """Return, for every benchmark, where to get its data and which files each split needs below the folder `--benchmarks`."""
    lines = [
        "Files below the folder --benchmarks. Where there are two, the first is its publisher's layout, the second that of",
        f"LLaVA's {LLAVA}, which may be the folder itself, or be below it.",
        "",
    ]
    for benchmark in BENCHMARKS.values():
        lines += [
            f"{benchmark.name}: {benchmark.metric}",
            f"  data    {benchmark.home}",
            f"  rule    {benchmark.source}",
        ]
        for split, needs in benchmark.splits.items():
            end = "" if needs.scored else " (submission file, no score: its answers are not public)"
            lines.append(f"  {benchmark.name}:{split}{end}")
            lines += [
                "    " + " or ".join(places_of(benchmark, split, file)) if file in needs.files else f"    {file}"
                for file in _folded(needs.files)
            ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _folded(files: Sequence[str]) -> list[str]:
    """Return the list of files, a long one shortened to its first two and the total; errors name missing files in full."""
    return list(files) if len(files) <= 15 else [*files[:2], f"… and so on, {len(files)} in all"]
