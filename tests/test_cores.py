"""Row 28 of the faults found by outside trials: defaults that depend on the machine are made from what is there."""

import os

import pytest

from switchkd.pipelines import cores
from switchkd.pipelines.cores import local_processes, workers_alone, workers_beside


@pytest.mark.parametrize(
    ("here", "processes", "workers"),
    [
        (1, 1, 0),
        (2, 1, 0),
        (3, 1, 0),
        (4, 1, 2),
        (8, 1, 6),
        (16, 1, 8),
        (128, 1, 8),
        (64, 8, 6),
        (128, 8, 8),
        (16, 8, 0),
        (4, 0, 2),
    ],
)
def test_workers_beside_a_step(monkeypatch, here, processes, workers):
    monkeypatch.setattr(cores, "cores", lambda: here)
    assert workers_beside(processes) == workers


@pytest.mark.parametrize(("here", "workers"), [(1, 0), (2, 2), (16, 16), (128, 16)])
def test_workers_that_have_the_machine_to_themselves(monkeypatch, here, workers):
    monkeypatch.setattr(cores, "cores", lambda: here)
    assert workers_alone() == workers


def test_processes_of_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_processes() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_processes() == 8


@pytest.mark.parametrize(
    ("quota", "affinity", "found"),
    [("max 100000", 16, 16), ("200000 100000", 16, 2), ("50000 100000", 16, 1), ("800000 100000", 4, 4), ("", 3, 3)],
)
def test_affinity_and_a_container_s_quota_count(monkeypatch, tmp_path, quota, affinity, found):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    assert cores.measured() == found
