"""Data and tiny models for the small versions of the paper's recipes: easy-VQA, below the working folder of an ablation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchkd.errors import ConfigError
from switchkd.fingerprints import hash_json
from switchkd.pipelines.demo import easy_vqa
from switchkd.pipelines.demo.easy_vqa import TEACHER_LANGUAGE, TEACHER_VISION, TEACHER_WEIGHTS
from switchkd.pipelines.run_folder import write_atomically

FILES = ("train", "what", "test")
_SHIPPED: dict[str, Any] = {"vision": TEACHER_VISION, "language": TEACHER_LANGUAGE, "shipped": True}


def check_small_models(sizes: Mapping[str, Any] | None, models: Mapping[str, Any]) -> None:
    """Check a recipe's entries about easy-VQA, before anything is created.

    Args:
        sizes: rows of each data file. models: name → a checkpoint folder, or a specification: `vision` and `language` (arguments
            of SiglipVisionConfig and Qwen2Config), `train` (stage → options of `switchkd train`), or `shipped: true` for the
            demo's teacher.

    Raises:
        ConfigError: names the entry; also if the package easy-vqa is missing.
    """
    specs = {name: model for name, model in models.items() if not isinstance(model, str)}
    if sizes is None:
        if specs:
            raise ConfigError(
                f"{next(iter(specs))} should be a checkpoint folder: only a recipe with easy_vqa makes models"
            )
        return
    easy_vqa.package_folder()
    if sizes.keys() != set(FILES) or not all(isinstance(n, int) and n > 0 for n in sizes.values()):
        raise ConfigError(f"easy_vqa should give the rows of {', '.join(FILES)}, found {dict(sizes)}")
    for name, spec in specs.items():
        wanted = {"shipped"} if "shipped" in spec else {"vision", "language"}
        if (
            spec.keys() - {"train"} != wanted
            or spec.get("shipped", True) is not True
            or ("shipped" in spec and "train" in spec)
        ):
            raise ConfigError(f"{name} should have vision, language and maybe train, or shipped: true; found {spec}")


def write_small_data(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write easy-VQA's images, and NAME-ROWS.json with evenly spread rows of each file.

    train: training questions; what: those of them about a colour or a shape, which replace captions in pre-training, since the
    demo's teacher answers them correctly but no longer generates its captions; test: test questions.
    """
    wanted = [folder / f"{name}-{sizes[name]}.json" for name in FILES]
    if all(path.is_file() for path in wanted):
        return
    easy_vqa.write_data(folder)
    rows = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("train", "test")}
    rows["what"] = [row for row in rows["train"] if row["question_type"] != "yes/no"]
    for name, path in zip(FILES, wanted, strict=True):
        write_atomically(path, json.dumps(easy_vqa.spread(rows[name], sizes[name])))


def untrained_path(folder: Path, name: str, model: Any, seed: int) -> Path:
    """Return the path of a model: a given checkpoint folder with {seed} replaced, or a folder to create, named by a hash."""
    if isinstance(model, str):
        return Path(model.replace("{seed}", str(seed)))
    made = {key: value for key, value in model.items() if key != "train"}
    return folder / f"{name}-{hash_json([made, seed])[:8]}"


def write_untrained(path: Path, model: Any, seed: int) -> None:
    """Create a model at its `untrained_path`; does nothing for a checkpoint folder, or if the model exists."""
    if isinstance(model, str) or path.exists():
        return
    spec = _SHIPPED if model.get("shipped") else model
    unfinished = path.with_name(f".{path.name}")
    weights = TEACHER_WEIGHTS if spec.get("shipped") else None
    easy_vqa.write_checkpoint(unfinished, vision=spec["vision"], language=spec["language"], seed=seed, weights=weights)
    unfinished.rename(path)
