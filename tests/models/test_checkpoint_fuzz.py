"""Rows 17 and 18, the fault harness: every key of a checkpoint's JSON files changed, and the checkpoint opened, checked and run."""

import copy
import json
import logging

import broken_checkpoints as broken
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import SwitchKDError
from switchkd.models.check_processor import check_processor
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.dry_run import plan
from switchkd.pipelines.capture.options import CacheOptions

FULL = pytest.mark.faults
GONE = object()
VALUES = {
    "missing": GONE,
    "null": None,
    "text": "x",
    "empty": "",
    "negative": -3,
    "zero": 0,
    "huge": 10**12,
    "larger": 2**70,
    "fraction": 0.5,
    "infinite": float("inf"),
    "true": True,
    "list": [],
    "lists": [[1, "x"], None],
    "object": {},
    "objects": {"height": -1, "x": {"y": []}},
}
FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
# Keys that the tiny checkpoint does not have, and that transformers reads.
ADDED = {
    "config.json": {"auto_map": {}, "quantization_config": {}, "projector_hidden_act": "gelu", "image_token_id": 2},
    "preprocessor_config.json": {"crop_size": {}, "pad_size": {}, "size_divisor": 1, "auto_map": {}, "do_pad": True},
    "tokenizer_config.json": {"chat_template": "", "added_tokens_decoder": {}, "auto_map": {}, "padding_side": "left"},
}


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    broken.copy(teacher, folder / "ckpt")
    tiny.data(folder, tiny.rows(3, text_only=(1,)))
    return folder


def paths_of(value, at=()):
    """Every key of a JSON object, those of the objects in it included."""
    for key, item in value.items():
        yield (*at, key)
        if isinstance(item, dict):
            yield from paths_of(item, (*at, key))


def changed(content, path, value):
    out = copy.deepcopy(content)
    *sections, key = path
    inside = out
    for section in sections:
        inside = inside[section]
    if value is GONE:
        inside.pop(key, None)
    else:
        inside[key] = value
    return out


def mutations(folder, file):
    """Yield (name, text) of one change each."""
    content = json.loads((folder / file).read_text())
    for path in paths_of(content | ADDED[file]):
        for name, value in VALUES.items():
            yield (
                f"{'.'.join(path)}: {name}",
                json.dumps(changed(content | ADDED[file] if path[0] in ADDED[file] else content, path, value)),
            )


def use(folder):
    """Open and run a checkpoint; "" or the message of the error, which is ours."""
    options = CacheOptions(folder / "ckpt", folder / "data.json", folder / "s.zarr", folder / "images", template="qa")
    try:
        check_processor(open_checkpoint(folder / "ckpt"))
        plan(options)
    except SwitchKDError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("share", [pytest.param(1, marks=FULL, id="all"), pytest.param(61, id="some")])
@pytest.mark.parametrize("file", FILES)
def test_rows_17_and_18_a_changed_key(place, file, share):
    """A run, or an error of ours that names the folder (of logits: the row); in bounded time and memory."""
    original = (place / "ckpt" / file).read_text()
    logging.disable()
    refused = 0
    try:
        for number, (name, text) in enumerate(mutations(place / "ckpt", file)):
            if number % share:
                continue
            (place / "ckpt" / file).write_text(text)
            try:
                with broken.bounded():
                    said = use(place)
            except Exception as error:
                raise AssertionError(f"{file}, {name}: {error!r}") from error
            assert not said or str(place) in said or "logits are not finite" in said, f"{name}: {said}"
            refused += bool(said)
            (place / "ckpt" / file).write_text(original)
    finally:
        logging.disable(logging.NOTSET)
        (place / "ckpt" / file).write_text(original)
    assert refused


@pytest.mark.parametrize(
    "change", ["config.json model_type", "preprocessor_config.json image_mean", "tokenizer_config.json eos_token"]
)
def test_the_command_prints_one_error(place, tmp_path, change):
    file, key = change.split()
    folder = broken.edit(
        broken.copy(place / "ckpt", tmp_path / "ckpt"), file, **{key: "x" if key == "image_mean" else 7}
    )
    words = ["data", "check", place / "data.json", "--images", place / "images", "--model", folder, "--template", "qa"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 2 and done.output.startswith("Error: ") and str(folder) in done.output
    assert "Traceback" not in done.output and isinstance(done.exception, SystemExit)
