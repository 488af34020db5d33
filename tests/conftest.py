"""Shared fixtures; everything a test writes is below pytest's temporary folder."""

import os
import tempfile

import pytest
import tiny

# Before `datasets` is imported anywhere: Arrow files of tests do not belong in the user's cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="switchkd-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

from switchkd.pipelines import cores

cores.cores = lambda: 2  # as on a small machine: tests look into what happens in their own process


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("teacher") / "ckpt", seed=0, width=32)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("student") / "ckpt", seed=1, width=16, layers=1)


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory, teacher, student):
    """A store, two runs and three evaluations; see report_runs.py."""
    import report_runs

    return report_runs.make(tmp_path_factory.mktemp("runs"), teacher, student)


@pytest.fixture(scope="session")
def later_runs(tmp_path_factory, teacher, student, finished_runs):
    """Runs with LoRA, held-out samples, a mixture and a live teacher; see report_runs.py."""
    import report_runs

    return report_runs.make_later_runs(tmp_path_factory.mktemp("later"), teacher, student, finished_runs)
