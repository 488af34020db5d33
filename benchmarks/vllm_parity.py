"""Families of models in vLLM beside transformers: how far their final states differ, case by case.

    make bench-vllm-families                     # rewrites docs/vllm-table.md

Tiny random models (text width 128) on the CPU, in float32. Each sample's states are compared with those of transformers alone. vLLM
runs all samples together in steps of 32 tokens, so prompts are cut, also inside images; then each again, from the prefix cache.
"""

import argparse
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
import vllm_families  # tests/helpers, on PYTHONPATH

from switchkd.errors import CheckpointError
from switchkd.pipelines.capture.backends import vllm_pooler

TABLE = Path(__file__).parents[1] / "docs/vllm-table.md"
REFUSED = ("gemma3", "paligemma", "qwen3_5", "vipllava")
COLUMNS = ("family", "one image", "several images", "text only", "several turns", "from the prefix cache", "top-k ids")


def differences(found, expected) -> float:
    """Return the largest difference of hidden states."""
    return float(np.abs(found.hidden - expected.hidden).max())


def measure(case) -> tuple[list[str], int, int]:
    """Return a family's cells, how often an image was cut, and how many prompts began with a cached prefix."""
    pieces, collect = [], vllm_pooler._collect

    def watched(held, runs, rows, begin):
        pieces.append((begin, begin + len(rows), runs))
        collect(held, runs, rows, begin)

    backend = case.open_vllm()
    with patch.object(vllm_pooler, "_collect", watched):
        first = backend.capture(case.samples, case.worker.manifest)
        cuts = case.cuts_inside_images(pieces)
        again, cached = [], 0
        for sample in case.samples:
            pieces.clear()
            again += backend.capture([sample], case.worker.manifest)
            cached += pieces[0][0] >= vllm_families.BLOCK  # the first rows that ran
    backend.engine.engine_core.shutdown()
    away = [differences(*pair) for pair in zip(first, case.expected, strict=True)]
    later = [differences(*pair) for pair in zip(again, case.expected, strict=True)]
    turns = [len(sample.turns) for sample in case.worker.samples]
    images = [len(sample.image_tokens) for sample in case.samples]
    kinds = (
        [count == 1 for count in images],
        [count > 1 for count in images],
        [count == 0 for count in images],
        [count > 1 for count in turns],
    )
    cells = [f"{max(value for value, chosen in zip(away, kind, strict=True) if chosen):.1e}" for kind in kinds]
    same = np.concatenate([(a.ids == b.ids).ravel() for a, b in zip(first, case.expected, strict=True)]).mean()
    return [*cells, f"{max(later):.1e}", f"{100 * same:.2f} %"], cuts, cached


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=vllm_families.FAMILIES)
    lines, notes = [COLUMNS, ("---", *("---:",) * (len(COLUMNS) - 1))], []
    cuts = cached = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = vllm_families.write_data(folder / "data")
        for family in parser.parse_args().families:
            cells, of_images, of_prefixes = measure(vllm_families.open_case(family, folder, data))
            lines.append((f"`{family}`", *cells))
            cuts, cached = cuts + of_images, cached + of_prefixes
            print(*lines[-1])
        for family in REFUSED:
            try:
                vllm_families.open_case(family, folder, data).open_vllm()
            except CheckpointError as error:
                notes.append(f"* `{family}`: {str(error).replace(str(folder / family), 'TEACHER')}.")
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    TABLE.write_text(
        "Largest difference of final hidden states between vLLM and transformers, float32, tiny random models on the CPU; made by "
        "`make bench-vllm-families`.\n"
        f"Prompts ran in steps of {vllm_families.CHUNK} tokens ({vllm_families.CHUNKS['llava_onevision']} for `llava_onevision`): "
        f"{cuts} steps ended inside an image. {cached} prompts began with a cached prefix;\ntwo samples have equal ids and other "
        f"images. Ids are the same top 16 at the same rank; those that differ are ties within 4e-4.\n\n{table}\n\n"
        "Refused on a CPU, before anything is written:\n\n" + "\n".join(notes) + "\n"
    )


if __name__ == "__main__":
    main()
