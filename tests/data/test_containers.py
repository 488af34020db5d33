"""One sample, one digest, whatever container it came in: JSON, folders of datasets, parquet, Arrow; both spellings of turns."""

import json
import pickle
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tiny

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile, Status, read_row
from switchkd.data.templates import TEMPLATES
from switchkd.errors import DataError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

CONTENT = tiny.rows(7, text_only=(1, 4), two_turns=(2, 4))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("containers")
    tiny.data(folder, CONTENT)
    return folder


def bytes_of(place, row):
    return (place / "images" / row["image"]).read_bytes() if row.get("image") else None


def to_plain(place):
    return [{"image": None, "question_type": None} | row for row in CONTENT]


def with_bytes(place):
    def held(row):
        data = bytes_of(place, row)
        return None if data is None else {"bytes": data, "path": row["image"]}

    return [row | {"image": held(row)} for row in to_plain(place)]


def image_feature(rows):
    features = datasets.Dataset.from_list(rows).features.copy()
    features["image"] = datasets.Image()
    return datasets.Dataset.from_list(rows, features=features)


def openai(rows, parts=False):
    """The same rows in OpenAI's words."""
    roles = {"human": "user", "gpt": "assistant"}

    def content(text):
        if not parts:
            return text
        image = [{"type": "image", "text": None}] if "<image>" in text else []
        return [*image, {"type": "text", "text": text.replace("<image>\n", "")}]

    return [
        {name: value for name, value in row.items() if name != "conversations"}
        | {"messages": [{"role": roles[t["from"]], "content": content(t["value"])} for t in row["conversations"]]}
        for row in rows
    ]


def saved(dataset, place, name):
    dataset.save_to_disk(place / name)
    return place / name


def as_json(place):
    return place / "data.json"


def as_openai_lines(place):
    path = place / "openai.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in openai(CONTENT)))
    return path


def as_openai_parts(place):
    path = place / "parts.json"
    path.write_text(json.dumps(openai(CONTENT, parts=True)))
    return path


def as_folder_with_paths(place):
    return saved(datasets.Dataset.from_list(to_plain(place)), place, "paths")


def as_folder_with_images(place):
    return saved(image_feature(with_bytes(place)), place, "images-held")


def absolute(place):
    return [row | {"image": row["image"] and str(place / "images" / row["image"])} for row in to_plain(place)]


def as_folder_into_which_datasets_took_the_images(place):
    return saved(image_feature(absolute(place)), place, "taken")


def as_parquet_of_datasets(place):
    folder = place / "parquet"
    folder.mkdir()
    dataset = image_feature(openai(with_bytes(place), parts=True))
    dataset.select(range(3)).to_parquet(folder / "train-00000-of-00002.parquet")
    dataset.select(range(3, 7)).to_parquet(folder / "train-00001-of-00002.parquet")
    return folder


def as_parquet_with_a_list_of_bytes(place):
    rows = to_plain(place)
    for row in rows:
        row["images"] = [data] if (data := bytes_of(place, row)) else []
        row.pop("image")
    path = place / "bytes.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def stream(rows, path):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def as_arrow_with_images(place):
    return stream(with_bytes(place), place / "held.arrow")


def as_arrow_with_absolute_paths(place):
    image = [path and {"bytes": None, "path": path} for path in (row["image"] for row in absolute(place))]
    return stream([row | {"image": image[i]} for i, row in enumerate(to_plain(place))], place / "paths.arrow")


CONTAINERS = [value for name, value in list(globals().items()) if name.startswith("as_")]
NO_FOLDER = (
    as_folder_with_images,
    as_folder_into_which_datasets_took_the_images,
    as_parquet_of_datasets,
    as_parquet_with_a_list_of_bytes,
    as_arrow_with_images,
)


def encoder(teacher, images):
    return SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], images, 64)


def told(samples, encode):
    return [(s.index, s.id, s.turns, s.status, s.question_type, encode(s).digest) for s in samples]


@pytest.mark.parametrize("make", CONTAINERS, ids=lambda make: make.__name__)
def test_the_same_samples_from_every_container(make, place, teacher):
    expected = told(SampleFile(place / "data.json"), encoder(teacher, place / "images").encode)
    samples = SampleFile(make(place))
    images = None if make in NO_FOLDER else place / "images"
    assert samples.needs_folder() is (make not in NO_FOLDER)
    assert told(samples, encoder(teacher, images).encode) == expected
    assert samples.has_image().tolist() == ["image" in row for row in CONTENT]
    again = pickle.loads(pickle.dumps(samples))
    assert told(again, encoder(teacher, images).encode) == expected


def test_data_sets_that_say_the_same_have_one_fingerprint(place, tmp_path):
    rows = to_plain(place)
    one = SampleFile(saved(datasets.Dataset.from_list(rows), tmp_path, "one")).fingerprint
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "two.parquet", row_group_size=2)
    assert SampleFile(tmp_path / "two.parquet").fingerprint == one
    rows[3]["conversations"] = tiny.conversation(("<image> what ?", "red"))
    assert SampleFile(saved(datasets.Dataset.from_list(rows), tmp_path, "three")).fingerprint != one


def test_cached_from_one_container_and_trained_from_another(place, teacher, student, tmp_path):
    held = image_feature(with_bytes(place))
    held.to_parquet(tmp_path / "held.parquet")
    made = CacheOptions(
        teacher=teacher, data=tmp_path / "held.parquet", out=tmp_path / "s.zarr", template="qa", k=8, workers=1
    )
    assert cache_teacher(made).samples == 7
    options = TrainOptions(
        student=student, teacher=teacher, data=place / "data.json", images=place / "images", cache=made.out,
        output=tmp_path / "a", steps=2, batch_size=4, workers=1,
    )  # fmt: skip
    from_json = train(options).losses
    options = replace(options, data=made.data, images=None, output=tmp_path / "b")
    assert train(options).losses == from_json


def test_a_defect_becomes_the_same_status(place, tmp_path):
    rows = with_bytes(place)
    rows[0]["image"]["bytes"] = rows[0]["image"]["bytes"][:-100]
    rows[2]["image"] = None  # the marker stays
    rows[3]["image"]["bytes"] = b""
    rows[5]["conversations"] = rows[5]["conversations"][:1]
    image_feature(rows).to_parquet(tmp_path / "bad.parquet")
    found = check_data(CheckOptions(tmp_path / "bad.parquet"))
    ok, broken = Status.OK, Status.IMAGE_UNREADABLE
    expected = [broken, ok, Status.MARKER_WITHOUT_IMAGE, broken, ok, Status.ROLES_OUT_OF_ORDER, ok]
    assert [Status(code) for code in found.survey.status] == expected
    assert found.images_read
    assert found.survey.details[0].startswith("row 0: '000.png': ")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a.png"),
    ],
)
def test_an_image_named_in_a_part(part, expected):
    turns = [
        {"role": "user", "content": [part, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "x"},
    ]
    sample = read_row({"messages": turns}, 0)
    assert (sample.status, sample.image, sample.turns) == (Status.OK, expected, [("what ?", "x")])


def test_parts_that_cannot_be_used():
    def status(*parts):
        sample = read_row({"messages": [{"role": "user", "content": list(parts)}]}, 0)
        return sample.status, sample.detail

    video = {"type": "video"}
    assert status(video) == (Status.BAD_TURN, "turn 0 has a part of type 'video'; known: text, image, image_url")
    assert status("words")[0] is Status.BAD_TURN
    assert status({"type": "text"})[0] is Status.BAD_TURN


def test_what_is_no_data_set(place, tmp_path):
    def message(path):
        with pytest.raises(DataError) as caught:
            SampleFile(path)
        return str(caught.value)

    assert "is no data set: expected a folder that datasets saved" in message(tmp_path)
    dataset = datasets.Dataset.from_list(to_plain(place))
    saved(datasets.DatasetDict({"train": dataset, "test": dataset}), tmp_path, "splits")
    assert message(tmp_path / "splits").endswith(f"pass one of them, as {tmp_path / 'splits/test'}")
    saved(dataset.select([]), tmp_path, "empty")
    assert message(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} ")
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 no")
        assert "cannot be read as a data set" in message(tmp_path / name)
    assert "no data file" in message(tmp_path / "y.parquet")
