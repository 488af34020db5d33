"""Row 26 of the faults found by outside trials: samples are inspected once, what was found is kept, and nothing stale is read."""

import os
from dataclasses import replace

import pytest
import tiny

from switchkd.data import row_cache
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import DataError, ReadFailure
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.preflight import kept as kept_module
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.kept import KeptFindings
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.preflight.skip_limit import SkipLimit
from switchkd.pipelines.preflight.survey import SampleInspector, probe, survey
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Ten samples in blocks of four rows, a cache of their own, and images that are older than a tick of the clock."""
    data = tiny.data(tmp_path / "data", tiny.rows(10, text_only=(3,)))
    monkeypatch.setattr(kept_module, "cache_folder", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(kept_module, "BLOCK_ROWS", 4)
    monkeypatch.setattr(kept_module, "TICK_SECONDS", -1e9)
    return data.parent


@pytest.fixture
def inspected(monkeypatch):
    """The rows that were inspected."""
    rows, original = [], SampleInspector.inspect

    def counting(self, sample):
        rows.append(sample.index)
        return original(self, sample)

    monkeypatch.setattr(SampleInspector, "inspect", counting)
    return rows


def inspector_of(place, teacher, **more):
    settings = {"template": TEMPLATES["qa"], "images": place / "images", "max_length": 64} | more
    return SampleInspector(SampleEncoder(open_checkpoint(teacher), **settings))


def look(place, teacher, **more):
    return survey(SampleFile(place / "data.json"), inspector_of(place, teacher, **more))


def test_a_second_survey_inspects_nothing_and_finds_the_same(place, teacher, inspected):
    (place / "images/004.png").write_bytes(b"page")
    first = look(place, teacher)
    assert sorted(inspected) == list(range(10))
    inspected.clear()
    second = look(place, teacher)
    assert not inspected
    for name in ("status", "tokens", "positions"):
        assert (getattr(first, name) == getattr(second, name)).all()
    assert (first.details, first.notes) == (second.details, second.notes)
    assert list(first.details) == [4]


@pytest.mark.parametrize("change", ["content", "same size and time", "gone", "back"])
def test_a_changed_image_is_inspected_again_and_no_other(place, teacher, inspected, change):
    path = place / "images/005.png"
    content, about = path.read_bytes(), path.stat()
    if change == "back":
        path.unlink()
    before = look(place, teacher)
    inspected.clear()
    if change == "content":
        path.write_bytes(b"not an image")
    elif change == "same size and time":  # ctime tells
        path.write_bytes(b"x" * len(content))
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(content)
    after = look(place, teacher)
    assert inspected == [5]
    assert (before.status[5] == 0) == (change != "back")
    assert (after.status[5] == 0) == (change == "back")


def test_an_image_written_just_now_is_not_trusted(place, teacher, inspected, monkeypatch):
    monkeypatch.setattr(kept_module, "TICK_SECONDS", 1e9)
    look(place, teacher)
    inspected.clear()
    look(place, teacher)
    assert sorted(inspected) == [0, 1, 2, 4, 5, 6, 7, 8, 9]  # 3 has no image


@pytest.mark.parametrize("change", ["data", "max_length", "template", "limit", "folder", "code"])
def test_what_else_findings_depend_on_is_their_name(place, teacher, inspected, change, monkeypatch):
    look(place, teacher)
    inspected.clear()
    more = {
        "max_length": {"max_length": 12},
        "template": {"template": TEMPLATES["plain"]},
        "limit": {"max_image_pixels": 9},
        "folder": {"images": place},
    }.get(change, {})
    if change == "data":
        (place / "data.json").write_text((place / "data.json").read_text().replace("red", "blue", 1))
    if change == "code":
        monkeypatch.setattr(kept_module, "_code", lambda: ["another version"])
    look(place, teacher, **more)
    assert sorted(inspected) == list(range(10))


def test_images_inside_a_data_set_belong_to_its_name(tmp_path, place, teacher, inspected):
    import datasets

    def write(colour):
        image = {"bytes": (place / f"images/00{colour}.png").read_bytes(), "path": None}
        rows = [{"image": image, "conversations": tiny.conversation(("what ?", "red"))}] * 3
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")

    for colour in (1, 2):
        write(colour)
        found = survey(SampleFile(tmp_path / "d.parquet"), inspector_of(place, teacher))
        assert (found.status == 0).all()
        assert inspected == [0, 1, 2]
        inspected.clear()


def test_an_interrupted_survey_goes_on(place, teacher, inspected, monkeypatch):
    class Killed(BaseException):
        pass

    original = SampleInspector.inspect

    def killed(self, sample):
        if len(inspected) == 6:
            raise Killed
        return original(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(SampleInspector, "inspect", killed)
        with pytest.raises(Killed):
            look(place, teacher)
    assert sorted(inspected) == [0, 1, 3, 4, 6, 9]  # the first block, and two rows of the second one
    inspected.clear()
    look(place, teacher)
    assert sorted(inspected) == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("damage", ["cut", "changed", "of other rows"])
def test_a_damaged_block_is_inspected_again(place, teacher, inspected, damage):
    look(place, teacher)
    (folder,) = (place.parent / "cache/surveys").iterdir()
    block = folder / "000001.json"
    text = block.read_text()
    block.unlink()
    if damage == "cut":
        block.write_text(text[:-9])
    elif damage == "changed":
        block.write_text(text.replace("[0,", "[1,", 1))
    else:
        block.write_bytes((folder / "000002.json").read_bytes())
    inspected.clear()
    assert (look(place, teacher).status == 0).all()
    assert sorted(inspected) == [1, 4, 7]
    assert not list(folder.glob(".*"))


def test_a_cache_that_cannot_be_written_costs_only_time(place, teacher, monkeypatch, caplog):
    (place.parent / "cache").write_text("a file")
    assert (look(place, teacher).status == 0).all()
    assert caplog.text.count("cannot be kept") == 1


def test_a_failure_around_the_data_is_not_kept(place, teacher, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "switchkd.pipelines.preflight.inspector.decode", lambda *_: (_ for _ in ()).throw(ReadFailure("EIO"))
        )
        with pytest.raises(ReadFailure, match="row 0: EIO"):
            look(place, teacher)
    assert (look(place, teacher).status == 0).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_check_of_data_and_training_share_it(place, student, teacher, inspected, tmp_path, workers):
    check_data(
        CheckOptions(
            place / "data.json", place / "images", model=student, template="qa", max_length=64, workers=workers
        )
    )
    inspected.clear()
    options = TrainOptions(
        student=student, data=place / "data.json", images=place / "images", output=tmp_path / "run", objective="sft",
        switch=False, template="qa", max_length=64, batch_size=5,
    )  # fmt: skip
    train(options)
    train(replace(options, output=tmp_path / "other"))
    assert not inspected


def test_a_check_without_model_and_images_keeps_nothing(place):
    check_data(CheckOptions(place / "data.json"))
    assert not (place.parent / "cache").exists()


def test_a_probe_is_a_part_of_the_survey(place, teacher, inspected):
    found = probe(SampleFile(place / "data.json"), inspector_of(place, teacher))
    assert sorted(found) == sorted(inspected) == [0, 3, 6, 9]
    inspected.clear()
    look(place, teacher)
    assert sorted(inspected) == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize(("bad", "stops"), [(0, False), (10, False), (21, False), (40, True), (1000, True)])
def test_a_part_foretells_the_whole_with_certainty(tmp_path, bad, stops):
    limit = SkipLimit(tmp_path, 665_000, 0.01)
    if stops:
        with pytest.raises(DataError, match=rf"{bad:,} of 1,024 samples from all over .* allows 6,650 of 665,000"):
            limit.foresee({"image_missing": bad}, 1024)
    else:
        limit.foresee({"image_missing": bad}, 1024)
    assert not limit.skipped


def test_the_cache_of_rows_holds_it(tmp_path, teacher):
    data = tiny.data(tmp_path, tiny.rows(2))
    kept = KeptFindings(SampleFile(data), inspector_of(tmp_path, teacher))
    assert kept.folder.is_relative_to(row_cache.cache_folder("surveys"))
