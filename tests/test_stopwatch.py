"""Times of steps in a file: of interrupted runs, and of several processes."""

import json
from multiprocessing import get_context

from switchkd.pipelines.stopwatch import Stopwatch


def time_many(path, name, start):
    start.wait()
    for number in range(50):
        with Stopwatch(path).timing(f"{name}-{number}"):
            pass


def test_no_time_of_another_process_is_lost(tmp_path):
    """Two processes write a hundred steps at the same time; a third start adds to what is there."""
    context, path = get_context("fork"), tmp_path / "seconds.json"
    start = context.Event()
    workers = [context.Process(target=time_many, args=(path, name, start)) for name in "ab"]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join()
    assert set(json.loads(path.read_text())) == {f"{name}-{n}" for name in "ab" for n in range(50)}
    watch = Stopwatch(path)
    before = watch.seconds["a-0"]
    with watch.timing("a-0"):
        pass
    assert watch.seconds["a-0"] > before and len(watch.seconds) == 100
