"""One command caches every data file of a mixture: each its own store, resumable, shared out among workers."""

import json
import shutil
from dataclasses import replace

import mixtures
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import ConfigError, DataError, StoreMismatch
from switchkd.models import checkpoint
from switchkd.pipelines.capture import worker
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.mixture import cache_mixture
from switchkd.pipelines.mixture import read_mixture
from switchkd.stores import TeacherStore


@pytest.fixture
def folder(tmp_path):
    mixtures.cut(tmp_path)
    return tmp_path


def bytes_of(store):
    """The bytes of a store's arrays by name; what describes a part also says who wrote it and when."""
    files = (path for path in sorted((store / "parts").rglob("*")) if path.is_file())
    return {path.relative_to(store): path.read_bytes() for path in files if path.parent.parent.name != "parts"}


def count_loads(monkeypatch):
    opened, seen = worker.open_backend, []

    def counting(*given, **named):
        seen.append(given)
        return opened(*given, **named)

    monkeypatch.setattr(worker, "open_backend", counting)
    return seen


def test_each_store_is_that_of_a_command_of_its_own_with_one_teacher(folder, teacher, monkeypatch):
    loads = count_loads(monkeypatch)
    hashed, hash_weights = [], checkpoint.hash_weights
    monkeypatch.setattr(checkpoint, "hash_weights", lambda *given: hashed.append(given) or hash_weights(*given))
    found = mixtures.cache(teacher, folder)
    assert (len(loads), len(hashed)) == (1, 1)
    assert {name: (done.samples, done.parts_written, done.parts_missing) for name, done in found.items()} == {
        "a": (7, 2, 0),
        "b": (5, 1, 0),
    }
    for name in "ab":
        alone = mixtures.cache_options(teacher, folder, data=folder / f"{name}.json", out=folder / f"{name}.zarr")
        cache_teacher(alone)
        mine, own = (TeacherStore.open(place / f"{name}.zarr") for place in (folder / "stores", folder))
        assert mine.manifest.identity == own.manifest.identity
        assert bytes_of(mine.path) == bytes_of(own.path)


def test_the_same_command_goes_on_and_does_nothing_twice(folder, teacher, monkeypatch):
    mixtures.cache(teacher, folder)
    shutil.rmtree(folder / "stores/a.zarr/parts/00001")
    before = bytes_of(folder / "stores/b.zarr")
    found = mixtures.cache(teacher, folder)
    assert [(done.parts_written, done.parts_already_there) for done in found.values()] == [(1, 1), (0, 1)]
    assert bytes_of(folder / "stores/b.zarr") == before
    loads = count_loads(monkeypatch)
    assert sum(done.parts_written for done in mixtures.cache(teacher, folder).values()) == 0
    assert loads == []


def test_workers_share_the_parts_of_all_stores(folder, teacher):
    """Three parts and five: of files with one part each, the first worker does not get all."""
    options = mixtures.cache_options(teacher, folder, part_size=3)
    written = []
    for index in range(4):
        done = cache_mixture(read_mixture(options.data), replace(options, shard=(index, 4)))
        written.append(sum(each.parts_written for each in done.values()))
    assert written == [2, 1, 1, 1]
    for name in "ab":
        TeacherStore.open(folder / f"stores/{name}.zarr").check_complete()
    many = mixtures.write(folder, "many.yaml", a={"store": str(folder / "m/a.zarr")})
    one = mixtures.cache_options(teacher, folder, data=many, out=folder / "m", part_size=16)
    done = [cache_mixture(read_mixture(many), replace(one, shard=(index, 2))) for index in range(2)]
    assert [[each.parts_written for each in of.values()] for of in done] == [[1, 0], [0, 1]]


@pytest.mark.parametrize("changed", ["teacher", "data"])
def test_a_store_of_another_teacher_or_data_is_refused_before_anything_runs(
    folder, teacher, tmp_path_factory, changed, monkeypatch
):
    options = mixtures.cache_options(teacher, folder)
    other = teacher
    if changed == "teacher":
        other = tiny.checkpoint(tmp_path_factory.mktemp("other") / "ckpt", seed=9)
    cache_teacher(replace(options, teacher=other, data=folder / "b.json", out=folder / "stores/b.zarr"))
    if changed == "data":
        rows = json.loads((folder / "b.json").read_text())
        (folder / "b.json").write_text(json.dumps(rows[1:]))
    loads = count_loads(monkeypatch)
    with pytest.raises(StoreMismatch, match=rf"mixture.yaml, entry b: .*b.zarr[\s\S]*{changed}"):
        mixtures.cache(teacher, folder)
    assert loads == []
    assert not (folder / "stores/a.zarr").exists()


def test_entries_have_their_own_images_template_and_store(folder, teacher):
    shutil.copytree(folder / "images", folder / "more")
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    for name in ("000", "001", "002", "004", "005", "006"):
        shutil.copy(folder / f"more/{name}.png", folder / "images")
    store = folder / "elsewhere/x.zarr"
    mixture = mixtures.write(folder, b={"images": str(folder / "more"), "template": "plain", "store": str(store)})
    found = mixtures.cache(teacher, folder)
    assert found["b"].skipped == {}
    assert TeacherStore.open(store).manifest.template["name"] == "plain"
    with pytest.raises(DataError, match="entry b: .*images"):
        cache_mixture(
            read_mixture(mixtures.write(folder)), replace(mixtures.cache_options(teacher, folder), out=folder / "n")
        )
    entry = mixtures.write(folder, b={"teacher": str(folder)})
    with pytest.raises(
        ConfigError, match=r"entry b: its teacher is .*: cache it by itself, with --data .*b.json --out"
    ):
        cache_mixture(read_mixture(entry), mixtures.cache_options(teacher, folder))
    assert mixture == entry


def test_a_bad_row_is_told_with_its_entry(folder, teacher):
    (folder / "images/008.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"entry b: image_unreadable: row 1: "):
        mixtures.cache(teacher, folder, strict=True)


def test_the_commands_print_every_entry(folder, teacher, monkeypatch):
    loads = count_loads(monkeypatch)
    mixture, images = folder / "mixture.yaml", folder / "images"
    words = ["--teacher", teacher, "--data", mixture, "--images", images, "--out", folder / "s", "--template", "qa"]
    words = ["cache-teacher", *map(str, words), "--device", "cpu"]
    plan = CliRunner().invoke(main, [*words, "--dry-run"])
    assert (plan.exit_code, len(loads), (folder / "s").exists()) == (0, 1, False), plan.output
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "together: 12 samples, about" in plan.output
    assert [f"{name}:\nsamples    {count}" in plan.output for name, count in (("a", 7), ("b", 5))] == [True, True]
    assert f"{folder}/s/a.zarr: 1 part written" in done.output
    assert f"{folder}/s/b.zarr: 1 part written" in done.output
    assert "a: payload: " in done.output
    assert [len(TeacherStore.open(folder / f"s/{name}.zarr")) for name in "ab"] == [7, 5]
