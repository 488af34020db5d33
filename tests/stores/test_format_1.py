"""Stores and runs of format version 1, as an earlier version of the project wrote them, still open, verify, train and resume."""

import shlex
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import synthetic
from training import history, weights

from switchkd.cli.main import main
from switchkd.stores import TeacherStore
from switchkd.stores.verify import verify

FIXTURES = Path(__file__).parents[1] / "fixtures/format_1"
STORES = ("topk", "both", "bfloat16", "int8")
CACHE = shlex.split("cache-teacher --teacher teacher --data data.json --images images --template qa --part-size 3")
TRAIN = shlex.split(
    "train --student student --teacher teacher --data data.json --images images "
    "--steps 4 --batch-size 4 --lr 5e-3 --log-every 1 --save-every 2"
)
MADE_BY = {
    "topk": ["--k", "6"],  # the default of that version
    "both": ["--payload", "both", "--k", "6"],
    "bfloat16": ["--payload", "hidden", "--hidden-dtype", "bfloat16"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the fixtures as working directory, since a run's record holds the relative paths of its command."""
    here = shutil.copytree(FIXTURES, tmp_path / "here")
    monkeypatch.chdir(here)
    return here


def read_back(name):
    with np.load(FIXTURES / "read_back.npz") as arrays:
        return {key.split(".")[1]: arrays[key] for key in arrays if key.startswith(f"{name}.")}


@pytest.mark.parametrize("name", STORES)
def test_a_store_reads_as_it_did(name):
    store = TeacherStore.open(FIXTURES / f"stores/{name}.zarr")
    expected = read_back(name)
    for index, digest in enumerate(expected.pop("digest")):
        assert store.digest(index) == tuple(digest.tolist())
    found = store.payload(list(range(len(store)))).arrays()
    assert sorted(found) == sorted(expected)
    for array, values in expected.items():
        np.testing.assert_array_equal(found[array], values, err_msg=array)


@pytest.mark.parametrize("name", STORES)
def test_a_store_verifies(name):
    store = TeacherStore.open(FIXTURES / f"stores/{name}.zarr")
    found = dict(verify(store))
    assert sorted(found) == [0, 1, 2]
    assert not any(found.values()), found


@pytest.mark.parametrize("name", sorted(MADE_BY))
def test_an_unfinished_store_is_finished(name, folder):
    """A part is gone, as if its writer had been killed: the same command writes it and changes no other byte."""
    path = folder / f"stores/{name}.zarr"
    before = synthetic.contents(path)
    shutil.rmtree(path / "parts/00001")
    main([*CACHE, "--out", str(path), *MADE_BY[name]], standalone_mode=False)
    after = synthetic.contents(path)
    assert sorted(after) == sorted(before)
    assert [file for file in before if after[file] != before[file] and "parts/00001/" not in file] == []
    store, expected = TeacherStore.open(path), read_back(name)
    assert [store.digest(index) for index in range(8)] == [tuple(row.tolist()) for row in expected["digest"]]
    np.testing.assert_allclose(store.payload(list(range(8))).stats, expected["stats"], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("options", (["--payload", "hidden"], []))
def test_an_unfinished_store_of_int8_is_refused(folder, options):
    shutil.rmtree(folder / "stores/int8.zarr/parts/00001")
    message = (
        "begun with hidden states in int8, which is read but no longer written: train from it as it is, or cache into"
    )
    with pytest.raises(click.ClickException, match=message):
        main([*CACHE, "--out", "stores/int8.zarr", *options], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--payload", "hidden"], "payload: store 'both', here 'hidden'"),
        (["--hidden-dtype", "steps"], "dtype of hidden states: store 'float16', here 'steps'"),
    ],
)
def test_an_unfinished_store_is_not_finished_in_another_way(folder, options, message):
    shutil.rmtree(folder / "stores/both.zarr/parts/00001")
    with pytest.raises(click.ClickException, match=message):
        main([*CACHE, "--k", "6", "--out", "stores/both.zarr", *options], standalone_mode=False)


@pytest.mark.parametrize("name", STORES)
def test_a_store_has_its_own_rule_for_the_knee(name):
    """Statistics of version 1 come from logits in the dtype of the head, so the knee is found on the stored states again."""
    manifest = TeacherStore.open(FIXTURES / f"stores/{name}.zarr").manifest
    assert (manifest.version, manifest.stats_dtype, manifest.has_exact_knee) == (1, "", False)


def test_a_finished_run_is_finished(folder, capsys):
    main([*TRAIN, "--cache", "stores/topk.zarr", "--output", "finished"], standalone_mode=False)
    assert "was already trained for 4 steps on 8 samples" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(folder, capsys):
    """From checkpoint-2 to the losses and weights of the run that was not interrupted; another machine may round otherwise."""
    main([*TRAIN, "--cache", "stores/topk.zarr", "--output", "interrupted"], standalone_mode=False)
    assert "trained for 4 steps" in capsys.readouterr().out
    for mine, expected in zip(history(folder / "interrupted"), history(folder / "finished"), strict=True):
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-6)
    trained, expected = weights(folder / "interrupted"), weights(folder / "finished")
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        if not name.endswith("k_proj.bias"):  # no gradient but rounding
            np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ("both", "bfloat16", "int8"))
def test_a_student_trains_from_a_store(name, folder, capsys):
    main([*TRAIN, "--cache", f"stores/{name}.zarr", "--output", "fresh"], standalone_mode=False)
    assert "trained for 4 steps" in capsys.readouterr().out
    # Not exact beside the run from top-k logits: how near depends on what the store keeps.
    ce = [(step, ce) for step, ce, *_ in history(folder / "fresh")]
    assert ce == [pytest.approx((step, ce), rel=0.05) for step, ce, *_ in history(folder / "finished")]


def test_other_options_than_the_runs_are_refused(folder):
    with pytest.raises(click.ClickException, match="begun with other options:\n  lr: run 0.005, now 0.1"):
        main([*TRAIN, "--lr", "0.1", "--cache", "stores/topk.zarr", "--output", "interrupted"], standalone_mode=False)
