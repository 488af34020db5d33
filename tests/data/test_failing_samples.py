"""Row 17: whatever a tokenizer, image processor or model raises names the row and the checkpoint, and says what to do."""

import errno
from dataclasses import replace

import numpy as np
import pytest
import tiny
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import read_row
from switchkd.data.templates import TEMPLATES
from switchkd.errors import CheckpointError, ReadFailure, RunError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.backends.base import BackendFailed
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.dry_run import plan
from switchkd.pipelines.capture.options import CacheOptions


class PanicException(BaseException):
    """As Rust's panics reach Python: below BaseException."""


ERRORS = [
    ValueError("Unable to infer channel dimension format"),
    TypeError("'NoneType' object is not subscriptable"),
    IndexError("index out of range in self"),
    KeyError("pixel_values"),
    AttributeError("no attribute"),
    RuntimeError("The size of tensor a (4) must match the size of tensor b (9)"),
    ZeroDivisionError("division by zero"),
    RecursionError("maximum recursion depth exceeded"),
    AssertionError(),
    Exception("bare, as tokenizers raises"),
    PanicException("called `Option::unwrap()` on a `None` value"),
]


@pytest.fixture
def checkpoint(teacher):
    return open_checkpoint(teacher)


def sample(index=7, image="0.png"):
    return read_row({"image": image, "conversations": tiny.conversation(("what is it ?", "a circle"))}, index)


def encoder_of(checkpoint, tmp_path):
    tiny.image(tmp_path / "0.png", 0)
    return SampleEncoder(checkpoint, TEMPLATES["qa"], tmp_path, 64)


class Raising:
    """Another object that raises at every call."""

    def __init__(self, other, error):
        self.other, self.error = other, error

    def __getattr__(self, name):
        return getattr(self.other, name)

    def __call__(self, *_, **__):
        raise self.error

    encode = __call__


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("part", ["tokenizer", "image_processor"])
def test_row_17_any_exception_of_a_tokenizer_or_processor(checkpoint, tmp_path, part, error):
    encoder = encoder_of(checkpoint, tmp_path)
    owner = encoder.words if part == "tokenizer" else encoder.reader
    setattr(owner, part, Raising(getattr(owner, part), error))
    message = rf"row 7: the tokenizer or image processor of {checkpoint.path} fails on it: .*; `switchkd data check"
    for act in (encoder.encode, lambda row: encoder.encode_prompt(row, 0)):
        with pytest.raises(CheckpointError, match=message) as caught:
            act(sample())
        assert caught.value.exit_code == 2 and caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory"), OSError(errno.EIO, "I/O error")], ids=repr
)
def test_a_lack_of_memory_is_not_the_checkpoints_fault(checkpoint, tmp_path, error):
    encoder = encoder_of(checkpoint, tmp_path)
    encoder.reader.image_processor = Raising(encoder.reader.image_processor, error)
    with pytest.raises((ReadFailure, CheckpointError), match="row 7: "):
        encoder.encode(sample())


def test_a_request_to_end_passes(checkpoint, tmp_path):
    encoder = encoder_of(checkpoint, tmp_path)
    encoder.reader.image_processor = Raising(encoder.reader.image_processor, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(sample())


SIZE = {"height": 16, "width": 16}
MISFITS = {
    "another size": ({"size": {"height": 32, "width": 32}}, r"pixels of shape \(3, 32, 32\), its vision tower takes \(3, 16, 16\)"),
    "not square": ({"size": {"shortest_edge": 16}, "do_center_crop": False}, r"its vision tower takes \(3, 16, 16\)"),
    "not resized": ({"do_resize": False}, r"pixels of shape \(3, 12, 16\)"),
    "no mean": ({"image_mean": None}, "fails on a grey image|not finite"),
    "a mean of two": ({"image_mean": [0.5, 0.5]}, "fails on a grey image"),
    "a mean in words": ({"image_mean": "grey"}, "fails on a grey image"),
    "no spread": ({"image_std": [0, 0, 0]}, "not finite|divide by zero"),
    "a scale that is infinite": ({"rescale_factor": float("inf")}, "not finite"),
    "a huge size": ({"size": {"height": 10**9, "width": 10**9}}, "size height 1000000000, expected 1 to 8,192 pixels"),
    "a huge crop": ({"do_center_crop": True, "crop_size": {"height": 10**9, "width": 1}}, "crop_size height"),
    "no size": ({"size": {"height": 0, "width": 0}}, "size height 0, expected"),
    "resampling of no kind": ({"resample": 99}, "fails on a grey image"),
}  # fmt: skip


@pytest.mark.parametrize("how", MISFITS)
def test_row_17_a_processor_that_does_not_fit_the_tower(checkpoint, tmp_path, how):
    changed, message = MISFITS[how]
    processor = CLIPImageProcessorPil(
        **({"size": SIZE, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    for name, value in changed.items():
        setattr(processor, name, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        encoder_of(replace(checkpoint, image_processor=processor), tmp_path)
    assert str(checkpoint.path) in str(caught.value) and "preprocessor_config.json that belongs to" in str(caught.value)


def test_row_17_ids_beyond_the_embedding(checkpoint, tmp_path):
    checkpoint.tokenizer.add_tokens(["purple"])
    encoder = encoder_of(checkpoint, tmp_path)
    encoder.encode(sample())
    row = read_row({"conversations": tiny.conversation(("what is purple ?", "a"))}, 3)
    message = (
        rf"row 3: token 'purple' of {checkpoint.path} has id 15, and the embedding has 15 rows: take the tokenizer"
    )
    with pytest.raises(CheckpointError, match=message):
        encoder.encode(row)


@pytest.fixture
def options(teacher, tmp_path):
    data = tiny.data(tmp_path / "data", tiny.rows(6, text_only=(3,)))
    return CacheOptions(
        teacher, data, tmp_path / "s.zarr", data.parent / "images", template="qa", part_size=6, batch_size=3
    )


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("act", [cache_teacher, plan])
def test_row_17_any_exception_of_the_model(options, monkeypatch, error, act):
    """At the text-only row, whose batch holds others."""
    original = TransformersBackend.capture

    def capture(self, samples, manifest):
        if any(item.media is None for item in samples):
            raise error
        return original(self, samples, manifest)

    monkeypatch.setattr(TransformersBackend, "capture", capture)
    with pytest.raises(RunError, match=rf"row 3: the model of {options.teacher} fails on it: ") as caught:
        act(options)
    assert "nothing of its part was stored" in str(caught.value)


def test_row_17_a_batch_that_fails_though_each_sample_alone_does_not(options, monkeypatch):
    original = TransformersBackend.capture

    def capture(self, samples, manifest):
        if len(samples) > 1:
            raise ValueError("too many images for this kernel")
        return original(self, samples, manifest)

    monkeypatch.setattr(TransformersBackend, "capture", capture)
    with pytest.raises(
        RunError, match=r"fails on the batch of rows [\d, ]+, though not on each alone: .*lower --batch-size"
    ):
        cache_teacher(options)


def test_a_backend_that_died_names_the_rows_that_were_with_it(options, monkeypatch):
    """Those of all batches under way, and none that was done."""
    original, seen = TransformersBackend.capture, []

    def capture(self, samples, manifest):
        seen.append(samples)
        if len(seen) > 2:  # the first two are the probe for the tables
            raise BackendFailed("the engine died")
        return original(self, samples, manifest)

    monkeypatch.setattr(TransformersBackend, "capture", capture)
    with pytest.raises(BackendFailed, match=r"^the engine died\. Under way were rows from \d to \d$") as caught:
        cache_teacher(options)
    assert str(caught.value).endswith("from 0 to 3")  # the text-only row comes first in its part


def test_the_check_of_the_processor_changes_nothing(checkpoint, tmp_path):
    encoder = encoder_of(checkpoint, tmp_path)
    again = encoder_of(open_checkpoint(checkpoint.path), tmp_path)
    assert encoder.encode(sample()).digest == again.encode(sample()).digest
    assert np.array_equal(*(tiny.pixels_of(each.encode(sample())) for each in (encoder, again)))
