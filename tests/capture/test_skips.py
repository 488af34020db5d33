"""Skipped samples: too many stop a capture or a survey, failures around the data stop it with the row, and `--retry-skipped`
captures anew what can now be read."""

import errno
import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.data import files
from switchkd.data.samples import Status
from switchkd.errors import DataError, ReadFailure, RunError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.preflight.skip_limit import allowed_skips
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore
from switchkd.stores.verify import verify


@pytest.fixture
def options(teacher, tmp_path):
    data = tiny.data(tmp_path / "data", tiny.rows(24))
    return CacheOptions(
        teacher=teacher,
        data=data,
        images=data.parent / "images",
        out=tmp_path / "s.zarr",
        template="qa",
        part_size=4,
        k=8,
    )


def hide(options, rows):
    for row in rows:
        (options.images / f"{row:03d}.png").rename(options.images / f"{row:03d}.hidden")


def show(options):
    for path in options.images.glob("*.hidden"):
        path.rename(path.with_suffix(".png"))


def stamps(options):
    return {path.name: path.stat().st_ctime_ns for path in (options.out / "parts").iterdir()}


@pytest.mark.parametrize(
    ("samples", "share", "allowed"),
    [(10, 0.01, 5), (12, 0.01, 6), (20, 0.01, 10), (900, 0.01, 10), (5000, 0.01, 50), (5000, 0, 10), (5000, 1, 5000)],
)
def test_the_limit_is_a_share_and_lets_few_rows_of_a_small_file_pass(samples, share, allowed):
    assert allowed_skips(samples, share) == allowed


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["missing", "not an image", "no turns"])
def test_too_many_skips_of_any_kind_stop_a_capture(options, kind, workers):
    if kind == "no turns":
        rows = tiny.rows(24)
        for row in rows[5:20]:
            row["conversations"] = []
        tiny.data(options.data.parent, rows)
    for row in range(5, 20):
        path = options.images / f"{row:03d}.png"
        path.unlink() if kind == "missing" else path.write_bytes(b"page") if kind == "not an image" else None
    with pytest.raises(DataError, match=r"11 samples of .* cannot be used: 11 .*allows 10 of 24.*--retry-skipped"):
        cache_teacher(replace(options, workers=workers))
    assert len(TeacherStore(options.out).parts()) < 6
    done = cache_teacher(replace(options, max_skipped=1))
    assert done.parts_missing == 0


def test_running_again_does_not_start_the_count_again(options):
    hide(options, range(5, 20))
    with pytest.raises(DataError):
        cache_teacher(options)
    with pytest.raises(DataError, match="11 samples"):
        cache_teacher(options)


def test_a_complete_store_of_skips_says_so_too(options):
    hide(options, range(2, 20))
    cache_teacher(replace(options, max_skipped=1))
    with pytest.raises(DataError, match=r"18 samples .*18 image_missing.*--retry-skipped"):
        cache_teacher(options)


def test_a_survey_stops_as_a_capture_does(options, student, tmp_path):
    hide(options, range(5, 20))
    run = TrainOptions(
        student=student, data=options.data, images=options.images, output=tmp_path / "run", objective="sft", switch=False,
        template="qa", batch_size=4,
    )  # fmt: skip
    with pytest.raises(DataError, match="11 samples .* cannot be used"):
        train(run)
    assert train(replace(run, max_skipped=1)).samples == 9


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE], ids=errno.errorcode.get)
def test_a_failure_around_the_data_stops_with_the_row_and_leaves_no_skip(options, code, workers, monkeypatch):
    real = os.open

    def opened(path, *arguments):
        if str(path).endswith("009.png"):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments)

    monkeypatch.setattr(files, "RETRY_SECONDS", ())
    monkeypatch.setattr(files.os, "open", opened)
    with pytest.raises(ReadFailure, match=r"row 9: .*009\.png could not be read"):
        cache_teacher(replace(options, workers=workers))
    monkeypatch.undo()
    cache_teacher(options)
    assert (TeacherStore(options.out).statuses() == Status.OK).all()


def test_a_lack_of_memory_stops_with_the_row(options, monkeypatch):
    def processed(*_, **__):
        raise MemoryError

    monkeypatch.setattr("switchkd.data.encoding.decode", processed)
    with pytest.raises(ReadFailure, match="row 0: out of memory"):
        cache_teacher(options)


def test_a_wrong_folder_is_refused_before_the_teacher_loads(options):
    (options.images / "deep").mkdir()
    (options.images / "deep/x").touch()
    with pytest.raises(DataError, match="not one of 24 images"):
        cache_teacher(replace(options, images=options.images / "deep"))
    assert not options.out.exists()


def test_retrying_writes_the_parts_anew_that_can_be_mended_and_no_other(options):
    hide(options, (5, 9, 21))
    (options.images / "014.png").rename(options.images / "014.hidden")
    (options.images / "014.png").write_bytes(b"page")
    cache_teacher(options)
    before = stamps(options)
    (options.images / "005.hidden").rename(options.images / "005.png")
    (options.images / "014.hidden").rename(options.images / "014.png")
    done = cache_teacher(replace(options, retry_skipped=True))
    assert (done.parts_written, done.parts_already_there, done.parts_missing) == (2, 4, 0)
    after = stamps(options)
    assert {name for name in after if after[name] != before[name]} == {"00001", "00003"}
    store = TeacherStore(options.out)
    assert np.flatnonzero(store.statuses() != Status.OK).tolist() == [9, 21]
    assert not any(findings for _, findings in verify(store))
    assert cache_teacher(replace(options, retry_skipped=True)).parts_written == 0  # 9 and 21 are still missing
    show(options)
    assert cache_teacher(replace(options, retry_skipped=True)).parts_written == 2
    whole = cache_teacher(replace(options, out=options.out.with_name("whole.zarr")))
    mended = TeacherStore(options.out)
    for index in range(24):
        assert mended[index].digest == TeacherStore(whole.store)[index].digest


@pytest.mark.parametrize("moment", ["before the removal", "between removal and commit"])
def test_an_interrupted_retry_is_finished_by_the_same_command(options, moment, monkeypatch):
    hide(options, (5, 13))
    cache_teacher(options)
    show(options)
    name = "remove_part" if moment == "before the removal" else "write_part"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"switchkd.stores.StoreWriter.{name}", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(replace(options, retry_skipped=True))
    monkeypatch.undo()
    cache_teacher(replace(options, retry_skipped=True))
    store = TeacherStore(options.out)
    store.check_complete()
    assert (store.statuses() == Status.OK).all()


def test_shards_retry_their_own_parts(options):
    hide(options, (1, 5))
    cache_teacher(options)
    show(options)
    first, second = (cache_teacher(replace(options, shard=(index, 2), retry_skipped=True)) for index in range(2))
    assert (first.parts_written, second.parts_written) == (1, 1)


def test_training_on_a_store_of_many_skips_says_so_first(options, student, tmp_path, caplog):
    hide(options, range(2, 20))
    cache_teacher(replace(options, max_skipped=1))
    show(options)
    run = TrainOptions(
        student=student, teacher=options.teacher, data=options.data, images=options.images, cache=options.out,
        output=tmp_path / "run", steps=1, batch_size=2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(run)
    assert "18 of 24 samples (75.0 %) do not train" in caplog.text


def test_the_command_ends_without_a_traceback(options):
    hide(options, range(5, 20))
    words = ["cache-teacher", "--teacher", options.teacher, "--data", options.data, "--images", options.images]
    words += ["--out", options.out, "--template", "qa"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert "Error: 11 samples" in done.output
    done = CliRunner().invoke(main, [*map(str, words), "--max-skipped", "1"])
    assert done.exit_code == 0, done.output
    show(options)
    done = CliRunner().invoke(main, [*map(str, words), "--retry-skipped"])
    assert "captured anew, since an image can now be read: 1" in done.output
    assert done.exit_code == 0, done.output


def test_a_part_that_cannot_be_removed_is_a_failed_run(options, monkeypatch):
    hide(options, (5,))
    cache_teacher(options)
    show(options)

    def refused(*_):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("switchkd.stores.storage.local.LocalStorage.remove_part", refused)
    with pytest.raises(RunError, match="cannot remove part 1"):
        cache_teacher(replace(options, retry_skipped=True))
