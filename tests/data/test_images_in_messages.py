"""Images that stand in the messages themselves: data URLs, and bytes in parquet. They are the same samples as with files."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tiny

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile, Status, read_row
from switchkd.data.templates import TEMPLATES
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train


@pytest.fixture
def pictures(tmp_path):
    return [tiny.image(tmp_path / f"images/{number:03d}.png", number).read_bytes() for number in range(4)]


def url_of(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


FORMS = {
    "openai": lambda data: {"type": "image_url", "image_url": {"url": url_of(data)}},
    "openai, flat": lambda data: {"type": "image_url", "image_url": url_of(data)},
    "url": lambda data: {"type": "image", "url": url_of(data)},
    "image": lambda data: {"type": "image", "image": url_of(data)},
    "no type of media": lambda data: {"type": "image", "image": url_of(data, "")},
    "a name and a set of characters": lambda data: {"type": "image", "image": url_of(data, "image/jpeg;name=a.b;charset=x")},
    "percent signs": lambda data: {"type": "image", "image": url_of(data).replace("=", "%3D").replace("+", "%2B")},
    "lines": lambda data: {"type": "image", "image": url_of(data)[:60] + "\n" + url_of(data)[60:]},
}  # fmt: skip
BYTES = {
    "bytes": lambda data: {"type": "image", "image": data},
    "bytes and path": lambda data: {"type": "image", "image": {"bytes": data, "path": "gone.png"}},
    "bytes without a path": lambda data: {"type": "image", "image": {"bytes": data, "path": None}},
    "in the part": lambda data: {"type": "image", "bytes": data, "path": None},
}  # fmt: skip


def row(part, index):
    question = {"role": "user", "content": [part, {"type": "text", "text": "what color is it ?"}]}
    return {
        "id": f"s{index}",
        "messages": [
            question,
            {"role": "assistant", "content": [{"type": "text", "text": ("red", "blue")[index % 2]}]},
        ],
    }


@pytest.mark.parametrize("form", [*FORMS, *BYTES])
def test_a_row_has_the_image(form, pictures):
    sample = read_row(row((FORMS | BYTES)[form](pictures[0]), 0), 0)
    assert sample.status is Status.OK, sample.detail
    assert sample.embedded() == pictures[0]


def written(folder, rows, kind):
    folder.mkdir()
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
        return folder / "d.parquet"
    text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"d.{kind}").write_text(text)
    return folder / f"d.{kind}"


@pytest.mark.parametrize(
    ("form", "kind"),
    [("openai", "json"), ("image", "jsonl"), ("url", "parquet"), ("bytes", "parquet"), ("bytes and path", "parquet")],
)
def test_every_container_gives_the_same_samples_as_files_do(teacher, tmp_path, pictures, form, kind):
    make = (FORMS | BYTES)[form]
    samples = SampleFile(
        written(tmp_path / "d", [row(make(data), number) for number, data in enumerate(pictures)], kind)
    )
    files = SampleFile(tiny.data(tmp_path / "files", tiny.rows(4), images=False))
    assert not samples.needs_folder() and files.needs_folder()
    opened = open_checkpoint(teacher)
    here = SampleEncoder(opened, TEMPLATES["qa"], None, 64)
    there = SampleEncoder(opened, TEMPLATES["qa"], tmp_path / "images", 64)
    for index in range(4):
        assert here.encode(samples[index]).digest == there.encode(files[index]).digest


def test_check_capture_and_training(teacher, student, tmp_path, pictures):
    """From the messages alone, without --images, in loader processes."""
    data = written(tmp_path / "d", [row(FORMS["openai"](item), n) for n, item in enumerate(pictures)], "jsonl")
    assert check_data(CheckOptions(data, model=teacher, template="qa")).skipped == 0
    cache_teacher(CacheOptions(teacher, data, tmp_path / "s.zarr", template="qa", part_size=2, workers=1))
    done = train(
        TrainOptions(student=student, data=data, output=tmp_path / "run", teacher=teacher, cache=tmp_path / "s.zarr",
                     batch_size=2, steps=2, workers=1)
    )  # fmt: skip
    assert (done.samples, done.skipped) == (4, {})


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("data:image/png;base64,", "a data URL without base64 data; expected data:image/png;base64,…"),
        ("data:image/png,abc", "without base64 data"),
        ("data:", "without base64 data"),
        ("data:image/png;base64,AAA", "a data URL that is damaged: Incorrect padding"),
        ("data:image/png;base64,A!!A", "a data URL that is damaged"),
        ("data:image/png;base64,ÄÄÄÄ", "a data URL that is damaged"),
        ("data:" + ";" * 100_000, "without base64 data"),
    ],
)
def test_a_damaged_data_url_is_a_bad_row(url, detail):
    for sample in (read_row(row({"type": "image", "image": url}, 0), 0), read_row(row({}, 0) | {"image": url}, 0)):
        assert sample.status in (Status.IMAGE_UNREADABLE, Status.BAD_TURN) and len(sample.detail) < 300
    assert detail in read_row(row({"type": "image", "image": url}, 0), 0).detail


def test_what_is_no_image_is_told_by_its_row_and_not_printed_whole(teacher, tmp_path, pictures):
    rows = [row(FORMS["openai"](data), number) for number, data in enumerate([b"x" * 10_000, *pictures])]
    found = check_data(CheckOptions(written(tmp_path / "d", rows, "json"), model=teacher, template="qa"))
    assert found.skipped == 1
    assert (
        found.survey.details[0].startswith("row 0: 'data:image/png;base64,eHh4") and len(found.survey.details[0]) < 500
    )


def test_two_images(pictures):
    content = [FORMS["openai"](data) for data in pictures[:2]]
    rows = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
    sample = read_row(rows, 0)
    assert sample.status is Status.OK
    assert [image.embedded() for image in sample.images] == list(pictures[:2])
