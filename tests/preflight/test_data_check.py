"""Real data files' defects: what caching, training and `data check` make of each."""

import json
import pickle
import re

import defects
import mixtures
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.data import format_check, histogram
from switchkd.cli.main import main
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, SampleFile, Status
from switchkd.data.templates import TEMPLATES
from switchkd.errors import DataError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.preflight.survey import SampleInspector, survey
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore

SKIPPED = {
    "image_missing": 2,
    "image_unreadable": 3,
    "marker_without_image": 1,
    "too_long": 2,
    "roles_out_of_order": 2,
    "no_conversation": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defects")
    defects.write(folder)
    return folder


@pytest.fixture(scope="module", params=[0, 2], ids=["in this process", "two workers"])
def cached(request, place, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "s.zarr"
    options = CacheOptions(
        teacher=teacher,
        data=place / "data.json",
        images=place / "images",
        out=out,
        template="qa",
        max_length=defects.MAX_LENGTH,
        part_size=7,
        max_skipped=1,
        workers=request.param,
    )
    return cache_teacher(options), TeacherStore.open(out)


def test_the_cache_gives_each_defect_its_status(cached):
    summary, store = cached
    assert dict(zip(defects.NAMES, map(Status, store.statuses()), strict=True)) == dict(
        zip(defects.NAMES, defects.STATUSES, strict=True)
    )
    assert summary.skipped == SKIPPED
    assert summary.samples == defects.STATUSES.count(Status.OK)


@pytest.mark.parametrize("objective", ["dbild-rkl", "sft"])
def test_training_skips_the_same_rows_with_and_without_a_store(cached, objective, place, teacher, student, tmp_path):
    _, store = cached
    options = TrainOptions(
        student=student,
        teacher=teacher,
        data=place / "data.json",
        images=place / "images",
        cache=store.path,
        output=tmp_path / "run",
        objective=objective,
        switch=objective != "sft",
        template="qa",
        max_length=defects.MAX_LENGTH,
        batch_size=4,
        max_skipped=1,
    )
    done = train(options)
    assert done.skipped == SKIPPED
    assert (done.samples, done.steps) == (12, 3)
    assert all(np.isfinite(value) for value in done.losses.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_survey_finds_what_the_cache_finds(place, teacher, workers):
    encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], place / "images", defects.MAX_LENGTH)
    found = survey(SampleFile(place / "data.json"), SampleInspector(encoder), workers)
    assert [Status(code) for code in found.status] == defects.STATUSES
    assert found.skipped() == SKIPPED
    by_name = dict(zip(defects.NAMES, found.tokens, strict=True))
    assert by_name["string id"] == 4 + 5 + 2  # image, "what color is it ?", "red <eos>"
    assert by_name["text only"] == 4 + 3
    assert by_name["over-long text"] == 4 * 30 + 2
    assert by_name["begins with the answer"] == -1
    assert dict(zip(defects.NAMES, found.positions, strict=True))["several turns"] == 4
    names = {note: [defects.NAMES[row] for row in rows] for note, rows in found.notes.items()}
    assert names == {"GIF behind .jpg": ["GIF behind .jpg", "animation behind .jpg"]}
    assert found.details[2] == f"row 2: no image {place}/images/ocr_vqa/images/1.jpg"


def test_without_a_model_rows_and_images_are_checked(place):
    found = check_data(CheckOptions(place / "data.json", place / "images"))
    expected = [Status.OK if status is Status.TOO_LONG else status for status in defects.STATUSES]
    assert [Status(code) for code in found.survey.status] == expected
    assert (found.unit, found.limit) == ("words", None)
    assert sorted(found.lengths)[-1] == 4 * 30 + 1
    bare = check_data(CheckOptions(place / "data.json"))
    assert bare.survey.skipped() == {"marker_without_image": 1, "roles_out_of_order": 2, "no_conversation": 1}
    assert "images were not read: pass --images" in format_check(bare)


def check(place, *more):
    words = ["data", "check", place / "data.json", "--images", place / "images", *more]
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_tells_kinds_reasons_and_lengths(place, teacher):
    done = check(place, "--model", teacher, "--template", "qa", "--max-length", 64)
    assert done.exit_code == 0, done.output
    for line in (
        "23 rows",
        "  one image, one turn                 16",
        "  one image, several turns             1",
        "  text only, one turn                  2",
        "would be skipped: 11 (47.83%)",
        "  more than --max-skipped 0.01 allows (10): cache-teacher would stop",
        "  image_missing                        2  rows 2, 3; row 2: no image",
        "  too_long                             2  rows 18, 19; row 18: 126 tokens, the limit is 64",
        "  roles_out_of_order                   2  rows 20, 21; row 20: turn 0 is from 'gpt'",
        "  GIF behind .jpg                      2  rows 7, 8",
        "tokens a sample: median 11, 90 % 122, 99 % 126, longest 126",
        "           9 to 12        10 ████████████████████████████████████████",
        "           over 64         2 ████████",
    ):
        assert line in done.output, line


def test_strict_exits_with_1_and_the_report_holds_every_skipped_row(place, tmp_path):
    done = check(place, "--strict", "--report", tmp_path / "deep/report.jsonl")
    assert done.exit_code == 1
    report = [json.loads(line) for line in (tmp_path / "deep/report.jsonl").read_text().splitlines()]
    bad = [status not in (Status.OK, Status.TOO_LONG) for status in defects.STATUSES]
    assert [line["row"] for line in report] == np.flatnonzero(bad).tolist()
    assert report[0] == {
        "row": 2,
        "id": "a",
        "reason": "image_missing",
        "detail": f"row 2: no image {place}/images/ocr_vqa/images/1.jpg",
    }
    good = tiny.data(tmp_path / "good", tiny.rows(3))
    assert check(good.parent, "--strict").exit_code == 0


def test_a_model_asks_for_the_image_folder(place, teacher):
    with pytest.raises(DataError, match="pass --images"):
        check_data(CheckOptions(place / "data.json", model=teacher))
    with pytest.raises(DataError, match="no image folder"):
        check_data(CheckOptions(place / "data.json", place / "nowhere"))


def test_a_bad_sample_survives_a_process_border():
    bad = pickle.loads(pickle.dumps(BadSample(Status.TOO_LONG, "row 3: 70 tokens", 70)))
    assert (bad.status, bad.detail, bad.tokens, str(bad)) == (
        Status.TOO_LONG, "row 3: 70 tokens", 70, "too_long: row 3: 70 tokens",
    )  # fmt: skip


def test_every_length_is_in_one_bar():
    lengths = np.random.default_rng(0).integers(1, 400, 1000)
    for limit in (None, 7, 100, 2048):
        drawn = histogram(lengths, "tokens", limit)
        assert sum(int(line[19:28].replace(",", "")) for line in drawn[1:]) == 1000
    assert histogram(np.array([], np.int64), "tokens", 64) == ["tokens a sample: none is known"]


def test_a_mixture_is_checked_file_by_file(tmp_path, teacher):
    mixtures.cut(tmp_path)
    mixture = mixtures.write(tmp_path, a={"weight": 2}, b={"cap": 3})
    (tmp_path / "images/008.png").write_bytes(b"none")
    words = ["--images", tmp_path / "images", "--report", tmp_path / "report.jsonl", "--workers", 0]
    done = CliRunner().invoke(main, ["data", "check", str(mixture), *map(str, words)])
    assert done.exit_code == 0, done.output
    assert "a: 7 rows\n" in done.output
    assert "b: 5 rows\n" in done.output
    assert f"{mixture}: 17 samples an epoch\n" in done.output
    assert re.search(r"\n  a +14  82.4%, of 7 usable, weight 2\n  b +3  17.6%, of 4 usable, cap 3\n", done.output)
    (line,) = map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())
    assert (line["data"], line["row"], line["reason"]) == (str(tmp_path / "b.json"), 1, "image_unreadable")
    assert CliRunner().invoke(main, ["data", "check", str(mixture), *map(str, words), "--strict"]).exit_code == 1
    words = ["--model", teacher, "--template", "qa", "-n", 1, "--start", 1]
    shown = CliRunner().invoke(main, ["data", "show", str(mixture), *map(str, words)])
    assert shown.exit_code == 0, shown.output
    assert "a, row 1, id s1, " in shown.output
    assert "b, row 1, id s8, " in shown.output
