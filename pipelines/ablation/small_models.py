"""Data and tiny models of recipes that need no checkpoint: easy-VQA or EmojiVQA, below the working folder of an ablation."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from switchkd.errors import ConfigError
from switchkd.fingerprints import hash_json
from switchkd.pipelines.demo import easy_vqa
from switchkd.pipelines.demo.easy_vqa import TEACHER_LANGUAGE, TEACHER_VISION, TEACHER_WEIGHTS
from switchkd.pipelines.emoji_vqa.drawings import require_renderer
from switchkd.pipelines.emoji_vqa.models import SHIPPED as SHIPPED_WITH_EMOJI_VQA
from switchkd.pipelines.emoji_vqa.models import TOWER, TOWER_WEIGHTS
from switchkd.pipelines.emoji_vqa.options import EmojiVQAOptions
from switchkd.pipelines.emoji_vqa.vocabulary import vocabulary
from switchkd.pipelines.options import fields_of, value_of_option
from switchkd.pipelines.run_folder import write_atomically

FILES = ("train", "what", "test")
VALIDATION = "val"  # may be given besides: questions of every fifth test image, which the test file then leaves out
VALIDATION_IMAGES = 5
PRIMARY_SPLITS = ("style", "combo")  # of EmojiVQA, on which methods are compared
# Suite → value of `shipped` → the model with weights that ship.
_SHIPPED: dict[str, dict[bool | str, dict[str, Any]]] = {
    "easy-vqa": {True: {"vision": TEACHER_VISION, "language": TEACHER_LANGUAGE, "weights": TEACHER_WEIGHTS}},
    "emoji-vqa": {
        name: {"vision": TOWER, "language": language, "weights": weights}
        for name, (language, weights) in SHIPPED_WITH_EMOJI_VQA.items()
    },
}
PRETRAINED = "pretrained"


def check_small_models(
    sizes: Mapping[str, Any] | None, emoji: Mapping[str, Any] | None, models: Mapping[str, Any]
) -> None:
    """Check a recipe's entries about easy-VQA and EmojiVQA, before anything is created.

    Args:
        sizes: rows of each data file of easy-VQA. emoji: options of `switchkd data emoji-vqa`, without `out`.
        models: name → a checkpoint folder, or a specification: `vision` and `language` (arguments of SiglipVisionConfig and
            Qwen2Config), `train` (stage → options of `switchkd train`), with EmojiVQA `tower`, pretrained for the one that ships,
            see `emoji_vqa/tower.py`, null for random weights; or `shipped: true` for the demo's teacher, with EmojiVQA
            `shipped: teacher` and `shipped: student` for those of `emoji_vqa/models.py`.

    Raises:
        ConfigError: names the entry; also if a package that makes the data is missing.
    """
    if emoji is not None:
        _emoji_options(Path("emoji-vqa"), emoji)
        require_renderer()
    specs = {name: model for name, model in models.items() if not isinstance(model, str)}
    if sizes is None and emoji is None:
        if specs:
            raise ConfigError(
                f"{next(iter(specs))} should be a checkpoint folder: only a recipe with easy_vqa or emoji_vqa makes models"
            )
        return
    if sizes is not None:
        easy_vqa.package_folder()
        if sizes.keys() - {VALIDATION} != set(FILES) or not all(isinstance(n, int) and n > 0 for n in sizes.values()):
            raise ConfigError(
                f"easy_vqa should give the rows of {', '.join(FILES)}, and maybe {VALIDATION}, found {dict(sizes)}"
            )
    shipped = _SHIPPED["easy-vqa" if emoji is None else "emoji-vqa"]
    for name, spec in specs.items():
        wanted = {"shipped"} if "shipped" in spec else {"vision", "language"}
        allowed = set() if "shipped" in spec else {"train"} | ({"tower"} if emoji is not None else set())
        if (
            spec.keys() - allowed != wanted
            or ("shipped" in spec and spec["shipped"] not in list(shipped))
            or spec.get("tower") not in (None, PRETRAINED)
        ):
            raise ConfigError(
                f"{name} should have vision, language and maybe train, and with emoji_vqa maybe tower: {PRETRAINED}, or shipped: "
                f"{' or '.join(yaml.safe_dump(one).split()[0] for one in shipped)}; found {spec}"
            )
        if spec.get("tower") and spec["vision"] != TOWER:
            raise ConfigError(f"{name}: the tower that ships has vision: {TOWER}, found {spec['vision']}")


def write_small_data(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write easy-VQA's images, and NAME-ROWS.json with evenly spread rows of each file.

    train: training questions; what: those of them about a colour or a shape, which replace captions in pre-training, since the
    demo's teacher answers them correctly but no longer generates its captions; test: test questions. With `val`, the questions of
    every fifth test image are its own, and those of the others are in test-ROWS-without-val.json.
    """
    wanted = {name: folder / f"{name}-{rows}.json" for name, rows in sizes.items()}
    if VALIDATION in sizes:
        wanted["test"] = folder / f"test-{sizes['test']}-without-val.json"
    if all(path.is_file() for path in wanted.values()):
        return
    easy_vqa.write_data(folder)
    rows = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("train", "test")}
    rows["what"] = [row for row in rows["train"] if row["question_type"] != "yes/no"]
    if VALIDATION in sizes:
        chosen = set(sorted({row["image"] for row in rows["test"]})[::VALIDATION_IMAGES])
        rows[VALIDATION] = [row for row in rows["test"] if row["image"] in chosen]
        rows["test"] = [row for row in rows["test"] if row["image"] not in chosen]
    for name, path in wanted.items():
        write_atomically(path, json.dumps(easy_vqa.spread(rows[name], sizes[name])))


def write_emoji_vqa(folder: Path, given: Mapping[str, Any]) -> None:
    """Build EmojiVQA, and `primary.json`, the splits style and combo in one file.

    In `primary.json` the kinds are named "style/what", "combo/where" and so on.

    Raises:
        ConfigError, DataError, RunError: see `emoji_vqa.build.build`.
    """
    from switchkd.pipelines.emoji_vqa.build import build

    build(_emoji_options(folder, given))
    primary = folder / "primary.json"
    if not primary.is_file():
        rows = [
            row | {"question_type": f"{split}/{row['question_type']}"}
            for split in PRIMARY_SPLITS
            for row in json.loads((folder / f"{split}.json").read_text())
        ]
        write_atomically(primary, json.dumps(rows))


def _emoji_options(folder: Path, given: Mapping[str, Any]) -> EmojiVQAOptions:
    known = set(fields_of(EmojiVQAOptions)) - {"out"}
    if unknown := given.keys() - known:
        raise ConfigError(f"emoji_vqa has no {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    return EmojiVQAOptions(out=folder, **{name: value_of_option(EmojiVQAOptions, name, v) for name, v in given.items()})


def untrained_path(folder: Path, name: str, model: Any, seed: int) -> Path:
    """Return the path of a model: a given checkpoint folder with {seed} replaced, or a folder to create, named by a hash."""
    if isinstance(model, str):
        return Path(model.replace("{seed}", str(seed)))
    made = {key: value for key, value in model.items() if key != "train"}
    # Weights that ship with EmojiVQA may be trained again; those of the demo's teacher stay, and with them the names of its runs.
    weights = TOWER_WEIGHTS if made.get("tower") else None
    if made.get("shipped") in list(SHIPPED_WITH_EMOJI_VQA):
        _, weights = SHIPPED_WITH_EMOJI_VQA[made["shipped"]]
    if weights is not None:
        made["sha256"] = _digest(weights)
    return folder / f"{name}-{hash_json([made, seed])[:8]}"


@cache  # every cell of a recipe asks for it
def _digest(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def write_untrained(path: Path, model: Any, seed: int, suite: str) -> None:
    """Create a model at its `untrained_path`; does nothing for a checkpoint folder, or if the model exists.

    Args:
        suite: easy-vqa or emoji-vqa, whose words its tokenizer has.
    """
    if isinstance(model, str) or path.exists():
        return
    spec = _SHIPPED[suite][model["shipped"]] if "shipped" in model else model
    unfinished = path.with_name(f".{path.name}")
    easy_vqa.write_checkpoint(
        unfinished,
        vision=spec["vision"],
        language=spec["language"],
        seed=seed,
        weights=spec.get("weights"),
        tower=TOWER_WEIGHTS if spec.get("tower") else None,
        words=vocabulary() if suite == "emoji-vqa" else None,
    )
    unfinished.rename(path)
