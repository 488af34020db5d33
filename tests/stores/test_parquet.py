"""`switchkd store export`: what is read back are the probabilities of the store, skipped samples and the rest included."""

import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import StoreError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.stores import TeacherStore
from switchkd.stores.parquet import export_parquet


@pytest.fixture(scope="module")
def stored(teacher, tmp_path_factory):
    place = tmp_path_factory.mktemp("parquet")
    data = tiny.data(place, tiny.rows(7, text_only=(1,), two_turns=(2,)))
    rows = json.loads(data.read_text())
    rows[4]["conversations"] = []
    data.write_text(json.dumps(rows))
    given = {"teacher": teacher, "data": data, "images": place / "images", "template": "qa", "part_size": 3}
    for payload in ("both", "hidden"):
        cache_teacher(CacheOptions(out=place / f"{payload}.zarr", payload=payload, k=5, **given))
    return place


def test_what_is_read_back(stored, tmp_path):
    store = TeacherStore.open(stored / "both.zarr")
    done = list(export_parquet(store, tmp_path))
    assert [part.part for part in done] == [0, 1, 2] and all(part.written for part in done)
    table = parquet.read_table(tmp_path)
    assert table.column("sample").to_pylist() == list(range(7))
    assert table.column("status").to_pylist() == ["ok"] * 4 + ["no_conversation"] + ["ok"] * 2
    for index, row in enumerate(table.to_pylist()):
        expected = store[index].payload
        if index == 4:
            assert row["ids"] is row["logprobs"] is row["tail"] is None
            continue
        assert row["ids"] == expected.ids.tolist()
        logprobs = np.array(row["logprobs"])
        np.testing.assert_allclose(logprobs, expected.logits - expected.stat("logsumexp")[:, None], rtol=0, atol=1e-6)
        assert (np.diff(logprobs) <= 0).all()
        np.testing.assert_allclose(np.exp(logprobs).sum(-1) + np.exp(row["tail"]), 1, atol=2e-3)
    assert sum(part.positions for part in done) == sum(len(store[index].payload) for index in range(7))
    held = parquet.read_metadata(tmp_path / "part-00000.parquet").metadata
    assert json.loads(held[b"switchkd"])["top_k"] == 5


def test_a_begun_export_goes_on_and_another_stores_is_refused(stored, tmp_path):
    store = TeacherStore.open(stored / "both.zarr")
    list(export_parquet(store, tmp_path))
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "part-00001.parquet").unlink()
    assert [part.written for part in export_parquet(store, tmp_path)] == [False, True, False]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    shutil.copy(tmp_path / "part-00000.parquet", tmp_path / "kept")
    with pytest.raises(StoreError, match="holds hidden states alone"):
        list(export_parquet(TeacherStore.open(stored / "hidden.zarr"), tmp_path / "other"))
    other = TeacherStore.open(stored / "both.zarr")
    object.__setattr__(other.manifest, "data", "another")
    with pytest.raises(StoreError, match="part-00000.parquet is of another store"):
        list(export_parquet(other, tmp_path))


def test_the_command(stored, tmp_path):
    words = ["store", "export", str(stored / "both.zarr"), "--out", str(tmp_path / "out")]
    for line in ("3 parts written, ", "0 parts written, 0 positions; 3 there already"):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        assert line in done.stdout
    refused = CliRunner().invoke(main, ["store", "export", str(stored / "hidden.zarr"), "--out", str(tmp_path / "x")])
    assert refused.exit_code == 2 and "cache with --payload topk or both" in refused.stderr
