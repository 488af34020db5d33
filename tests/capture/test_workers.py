"""One store from three workers that start late, die and come back: no coordinator, nothing lost, nothing written twice."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import synthetic
import tiny

from switchkd.errors import ConfigError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.stores import TeacherStore
from switchkd.stores.status import status

PARTS, WORKERS = 24, 3


def work(options):
    cache_teacher(options)


class Fleet:
    """Workers by their number; each is a process of its own, forked from a server that has torch loaded already."""

    def __init__(self, options):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["switchkd.pipelines.capture.cache_teacher"])
        self.options, self.running = options, {}

    def start(self, number):
        options = replace(self.options, shard=(number, WORKERS))
        self.running[number] = process = self.context.Process(target=work, args=(options,))
        process.start()
        return process.pid

    def kill(self, number):
        process = self.running.pop(number)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it had finished already: the test tests nothing"

    def join(self):
        for process in self.running.values():
            process.join(120)
            assert process.exitcode == 0


def wait_for(path, done):
    """Wait until a condition on the store's status holds."""
    deadline = time.monotonic() + 100
    while not (path.exists() and done(status(path))):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def by_process(path):
    return {int(writer.name.rpartition("-")[2]): writer for writer in status(path).writers}


def test_three_workers_that_start_late_die_and_come_back(teacher, tmp_path):
    data = tiny.data(tmp_path / "data", tiny.rows(PARTS))
    options = CacheOptions(
        teacher=teacher,
        data=data,
        images=data.parent / "images",
        out=tmp_path / "s.zarr",
        template="qa",
        payload="topk",  # the same bytes whatever a forward pass rounds
        part_size=1,
        batch_size=1,
    )
    fleet, path = Fleet(options), options.out
    first = fleet.start(0)
    wait_for(path, lambda found: len(found.done) >= 2)
    fleet.kill(0)
    at_its_death = by_process(path)[first].parts
    late = fleet.start(1)
    wait_for(path, lambda found: len(found.writers) == 2)
    fleet.start(2)
    fleet.start(0)
    fleet.kill(1)
    fleet.start(1)
    fleet.join()
    found, writers = status(path), by_process(path)
    TeacherStore(path).check_complete()
    assert (len(found.done), found.missing, found.seconds_left) == (PARTS, [], 0 if found.samples_per_second else None)
    assert writers[first].parts == at_its_death
    assert 4 <= len(writers) <= 5 and late in writers
    alone = tmp_path / "alone.zarr"
    cache_teacher(replace(options, out=alone))
    synthetic.assert_same_store(path, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "ray", "shard": (1, 2)}, "leave out --shard"),
        ({"actors": 2}, "--actors is Ray's"),
        ({"tensor_parallel": 2}, "add --backend vllm"),
        ({"engine": "ray"}, r"pip install 'switchkd\[ray\]'"),
    ],
)
def test_what_does_not_go_together_is_refused(teacher, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # without Ray
    options = CacheOptions(teacher=teacher, data=tmp_path / "no.json", out=tmp_path / "s.zarr")
    with pytest.raises(ConfigError, match=message):
        cache_teacher(replace(options, **change))
