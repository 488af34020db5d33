"""The types and ranges of a manifest's fields, checked once when a store is opened.

The bounds are far above those of any real store. They are there so that nothing is allocated, and no loop is run, for a number that
cannot be true.
"""

import re
from typing import Any

from switchkd.stores.checks import number, one_of, text, texts, whole
from switchkd.stores.layout import HIDDEN_DTYPES, PAYLOADS

SAMPLES = 1 << 40
PARTS = 1 << 20
PART_SAMPLES = 1 << 21
VOCAB_ROWS = 1 << 24
HIDDEN_WIDTH = 1 << 17
TOKENS = 1 << 31
PIXELS = 1 << 53
STEPS = 1e-9, 1e6  # smallest and largest quantisation step of a logit
STEP_RATIO = 1e6  # the depth of a level is computed in float64
TEACHER_FIELDS = ("config", "vision", "projector", "language", "dtype")
_CODE = re.compile(r"0|[1-9][0-9]{0,2}")


def check_manifest(data: dict[str, Any]) -> None:
    """Check the values of a manifest that has all its fields. Raises ValueError: says what was expected and found."""
    one_of(data["payload"], "payload", PAYLOADS)
    samples = whole(data["samples"], "samples", 0, SAMPLES)
    part_size = whole(data["part_size"], "part_size", 1, PART_SAMPLES)
    whole(-(-samples // part_size), "the number of parts", 0, PARTS)
    vocab_rows = whole(data["vocab_rows"], "vocab_rows", 1, VOCAB_ROWS)
    _check_topk(data, vocab_rows)
    _check_hidden(data)
    whole(data["image_tokens"], "image_tokens", 0, TOKENS)
    whole(data["max_length"], "max_length", 1, TOKENS)
    whole(data["max_image_pixels"], "max_image_pixels", 0, PIXELS)
    for name in ("tokenizer", "image_processor", "data"):
        text(data[name], name)
    for name in ("teacher", "template", "written_by"):
        texts(data[name], name)
    for name, needed in (("teacher", TEACHER_FIELDS), ("template", ("name",))):
        if missing := sorted(set(needed) - data[name].keys()):
            raise ValueError(f"{name} lacks {', '.join(missing)}")
    codes = texts(data["statuses"], "statuses")
    if "0" not in codes or not all(_CODE.fullmatch(code) and int(code) <= 255 for code in codes):
        raise ValueError("statuses should be an object from numbers, 0 to 255 with 0 among them, to names")
    if "stats_dtype" in data:
        text(data["stats_dtype"], "stats_dtype")
    number(data.get("visual_advantage", 0), "visual_advantage", 0, 1)


def _check_topk(data: dict[str, Any], vocab_rows: int) -> None:
    if data["payload"] == "hidden":
        for name in ("top_k", "fine", "coarse"):
            number(data[name], name, 0, 0)
        return
    whole(data["top_k"], "top_k", 1, vocab_rows)
    fine, coarse = (number(data[name], name, *STEPS) for name in ("fine", "coarse"))
    if not fine <= coarse <= fine * STEP_RATIO:
        raise ValueError(f"coarse should be from {fine:g} (fine) to {fine * STEP_RATIO:g}, found {coarse:g}")


def _check_hidden(data: dict[str, Any]) -> None:
    if data["payload"] == "topk":
        one_of(data["hidden_dtype"], "hidden_dtype", ("",))
        whole(data["hidden_width"], "hidden_width", 0, 0)
        number(data.get("hidden_error", 0), "hidden_error", 0, 0)
        return
    allowed = HIDDEN_DTYPES if data["version"] > 1 else ("float16", "bfloat16", "int8")
    one_of(data["hidden_dtype"], "hidden_dtype", allowed)
    whole(data["hidden_width"], "hidden_width", 1, HIDDEN_WIDTH)
    number(data.get("hidden_error", 0), "hidden_error", 0, 1e6)
