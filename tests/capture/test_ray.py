"""Capture over Ray: two actors fill one store; one is killed, and the store is whole all the same. Run by `make test-ray`."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import synthetic
import tiny

from switchkd.errors import ConfigError, InputError, StoreMismatch
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.ray_engine import plan_actors
from switchkd.stores import TeacherStore
from switchkd.stores.status import status
from switchkd.stores.verify import verify

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")


def both_begin(folder):
    """Return what Ray runs in each of its processes: an actor waits with its first part until two have begun.

    So one can be killed while both are at work, however busy the machine is. It is a function inside a function, since Ray's
    processes cannot import this module.
    """

    def hold_back():
        import os
        import time

        from switchkd.pipelines.capture.ray_engine import CaptureActor

        capture = CaptureActor._capture

        def held_back(self, part):
            (folder / str(os.getpid())).touch()
            deadline = time.monotonic() + 100
            while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            return capture(self, part)

        CaptureActor._capture = held_back

    return hold_back


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0"), ("OMP_NUM_THREADS", "1")):
            patch.setenv(name, value)
        hook = {"worker_process_setup_hook": both_begin(folder)}
        # Two actors, and Ray's own tasks.
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=hook)
        yield folder
        ray.shutdown()


@pytest.fixture
def options(teacher, tmp_path):
    data = tiny.data(tmp_path / "data", tiny.rows(60, text_only=(3,), two_turns=(5, 6)))
    (data.parent / "images/007.png").unlink()
    return CacheOptions(
        teacher=teacher,
        data=data,
        images=data.parent / "images",
        out=tmp_path / "s.zarr",
        template="qa",
        payload="topk",  # the same bytes whatever a forward pass rounds
        part_size=2,
        batch_size=1,
        device="auto",
        engine="ray",
        actors=2,
    )


def local(options, out):
    return replace(options, out=out, engine="local", actors=None, device="cpu")


def kill_one(path, found):
    """Kill the first writer that has committed two parts while most are missing."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists():
            so_far = status(path)
            if len(so_far.writers) == 2 and len(so_far.missing) > 10:
                process = int(so_far.writers[0].name.rpartition("-")[2])
                os.kill(process, signal.SIGKILL)
                found.append((process, len(so_far.missing)))
                return
        time.sleep(0.02)


def test_an_actor_is_killed_and_the_store_is_whole(cluster, options, tmp_path):
    found = []
    killer = threading.Thread(target=kill_one, args=(options.out, found))
    killer.start()
    done = cache_teacher(options)
    killer.join()
    assert found, "no actor was killed: the test tests nothing"
    assert len(list(cluster.iterdir())) >= 2, "actors were not held back"
    assert done.parts_missing == 0
    assert done.parts_written <= 30  # one that was committed just before the kill is counted as there
    store = TeacherStore(options.out)
    store.check_complete()
    assert not any(findings for _, findings in verify(store))
    writers = {writer.name.rpartition("-")[2]: writer.parts for writer in status(options.out).writers}
    assert str(found[0][0]) in writers
    assert len(writers) >= 3, "nobody came for the dead actor"
    alone = tmp_path / "alone.zarr"
    assert cache_teacher(local(options, alone)).skipped == {"image_missing": 1}
    synthetic.assert_same_store(options.out, alone)
    again = cache_teacher(options)
    assert (again.parts_written, again.parts_already_there) == (0, 30)


def test_another_store_is_refused_before_an_actor_starts(options):
    cache_teacher(local(options, options.out))
    with pytest.raises(StoreMismatch, match="k: store 15, here 5"):
        cache_teacher(replace(options, k=5))


def test_what_stops_an_actor_stops_the_job_with_its_own_words(cluster, options):
    (options.images / "000.png").unlink()
    with pytest.raises(ConfigError, match="device 'cuda:3' cannot be used"):
        cache_teacher(replace(options, device="cuda:3"))
    with pytest.raises(InputError, match=r"image_missing: row \d+: no image .*\.png$"):
        cache_teacher(replace(options, strict=True))


@pytest.mark.parametrize(
    ("change", "has", "expected"),
    [
        ({}, {"CPU": 8.0}, ("cpu", 1, {"num_cpus": 1})),
        ({"actors": 3}, {"CPU": 8.0}, ("cpu", 3, {"num_cpus": 1})),
        ({}, {"CPU": 8.0, "GPU": 16.0}, ("cuda", 16, {"num_gpus": 1})),
        ({"backend": "vllm", "tensor_parallel": 4}, {"GPU": 16.0}, ("cuda", 4, {"num_gpus": 4})),
        ({"device": "cpu", "actors": 2}, {"GPU": 16.0}, ("cpu", 2, {"num_cpus": 1})),
    ],
)
def test_an_actor_a_device(options, change, has, expected):
    planned, actors, resources = plan_actors(replace(options, **{"actors": None, "device": "auto"} | change), has)
    assert (planned.device, actors, resources) == expected


def test_more_gpus_a_teacher_than_there_are(options):
    with pytest.raises(ConfigError, match="--tensor-parallel 4, and the Ray cluster has 2 GPUs"):
        plan_actors(replace(options, backend="vllm", tensor_parallel=4), {"GPU": 2.0})
