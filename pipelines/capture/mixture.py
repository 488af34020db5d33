"""Capture of a mixture: the store of every data file, one after the other, with one teacher.

Parts are divided among workers over all stores together, so that small data files do not all go to the first worker.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from switchkd.errors import ConfigError
from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.cache_teacher import CacheSummary, capture
from switchkd.pipelines.capture.dry_run import Plan, plan
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.ray_engine import require_ray
from switchkd.pipelines.capture.worker import CaptureWorker
from switchkd.pipelines.mixture import Mixture, MixtureEntry
from switchkd.stores.storage.open import open_storage


def cache_mixture(
    mixture: Mixture, options: CacheOptions, tell: Callable[[str], None] = lambda line: None
) -> dict[str, CacheSummary]:
    """Create or continue the stores of a mixture; all are checked before the teacher runs. Returns entry → result.

    Args:
        options: `out` is the folder of the stores, see `Mixture.store_of`. tell: see `cache_teacher`.

    Raises:
        InputError, RunError: see `cache_teacher`; names the entry.
    """
    check_available(options.backend, options.device)
    if options.engine == "ray":
        require_ray()
    workers: list[CaptureWorker] = []
    parts_before = 0
    index, count = options.shard
    for entry in mixture.entries:
        with mixture.naming(entry):
            own = options_of_entry(mixture, entry, options)
            own = replace(own, shard=((index - parts_before) % count, count))
            worker = CaptureWorker(own, lender=workers[0] if workers else None)
            if open_storage(own.out).exists():
                worker.open_store()
            workers.append(worker)
            parts_before += worker.manifest.part_count
    # Checks of the teacher are those of a store that is begun now, if there is one.
    lender = next((worker for worker in workers if not open_storage(worker.options.out).exists()), workers[0])
    for worker in workers:
        worker.lender = None if worker is lender else lender
    found = {}
    for entry, worker in zip(mixture.entries, workers, strict=True):
        with mixture.naming(entry):
            found[entry.name] = capture(worker, partial(_tell_of, entry, tell))
    return found


def _tell_of(entry: MixtureEntry, tell: Callable[[str], None], line: str) -> None:
    tell(f"{entry.name}: {line}")


def plan_mixture(mixture: Mixture, options: CacheOptions) -> dict[str, Plan]:
    """Estimate the capture of every entry, see `dry_run.plan`; returns entry → estimate.

    Raises:
        InputError: as the capture itself would raise; names the entry.
    """
    each = {}
    for entry in mixture.entries:
        with mixture.naming(entry):
            each[entry] = options_of_entry(mixture, entry, options)
    found: dict[str, Plan] = {}
    lender = None
    for entry, own in each.items():
        with mixture.naming(entry):
            lender = lender or CaptureWorker(own)
            live = next((one.live_a_token for one in found.values() if one.live_a_token is not None), None)
            found[entry.name] = plan(own, lender, live)
    return found


def options_of_entry(mixture: Mixture, entry: MixtureEntry, options: CacheOptions) -> CacheOptions:
    """Return the options of the capture of one data file.

    Raises:
        ConfigError: its teacher is another one, or its store's name does not end in .zarr.
    """
    if entry.teacher is not None and entry.teacher.resolve() != options.teacher.resolve():
        raise ConfigError(
            f"its teacher is {entry.teacher}, and one command runs one teacher, {options.teacher}: cache it by itself, with --data "
            f"{entry.data} --out {mixture.store_of(entry, options.out)}"
        )
    return replace(
        options,
        data=entry.data,
        images=entry.images or options.images,
        template=entry.template or options.template,
        out=mixture.store_of(entry, options.out),
    )
