"""`switchkd cache-teacher`: capture."""

import math
import os
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import config_option, default_device, echo, importing, lines_of, quiet_libraries
from switchkd.cli.options import GroupedCommand, GroupedOption, options_of
from switchkd.counting import counted
from switchkd.pipelines.capture.options import BATCH_SIZES, SCALE, CacheOptions
from switchkd.pipelines.mixture import mixture_at

if TYPE_CHECKING:
    from switchkd.pipelines.capture.dry_run import Plan


@click.command("cache-teacher", cls=GroupedCommand)
@config_option
@options_of(CacheOptions)
@click.option(
    "--dry-run",
    cls=GroupedOption,
    group=SCALE,
    is_flag=True,
    help="Estimate positions, time, size by payload and free disk from a probe of random samples; nothing is written.",
)
@click.option(
    "--egress-price",
    cls=GroupedOption,
    group=SCALE,
    type=click.FloatRange(0),
    default=0.09,
    show_default=True,
    help="Dollars a GB that the dry run assumes where --out is on an object store; ask your provider.",
)
def command(
    shard: str | None,
    device: str | None,
    dry_run: bool,
    egress_price: float,
    batch_size: int | None,
    vllm_options: tuple[str, ...],
    **options: Any,
) -> None:
    """Store a teacher's output at every supervised position of a data file, or of every data file of a mixture.

    Run the same command again to continue after an interruption, or run it on several machines at once: a part that has been
    committed is never written twice.
    """
    quiet_libraries()
    with importing():
        from switchkd.pipelines.capture.cache_teacher import cache_teacher
        from switchkd.pipelines.capture.mixture import cache_mixture, plan_mixture
        from switchkd.pipelines.capture.sharding import resolve_shard

    vllm = options["backend"] == "vllm"
    if vllm and device is not None:
        raise click.UsageError("--device is not for vllm, which takes the devices it sees: set CUDA_VISIBLE_DEVICES")

    ray = options["engine"] == "ray"
    which, source = resolve_shard(shard, {} if ray else os.environ)
    if not ray:
        echo(f"worker {which[0]} of {which[1]} (from {source})", err=True)
    resolved = CacheOptions(
        shard=which,
        # Initialising CUDA here would prevent vLLM's processes from forking.
        device=device or ("cpu" if vllm else "auto" if ray and not dry_run else default_device()),
        batch_size=batch_size or BATCH_SIZES[options["backend"]],
        vllm_options=tuple(_name_and_value(text) for text in vllm_options),
        **options,
    )
    mixture = mixture_at(resolved.data)
    if dry_run:
        if mixture is None:
            _print_plan(resolved, egress_price)
        else:
            _print_plans(resolved, plan_mixture(mixture, resolved), egress_price)
        return
    if mixture is None:
        found = [cache_teacher(resolved, tell=lambda line: echo(line, err=True))]
    else:
        found = list(cache_mixture(mixture, resolved, tell=lambda line: echo(line, err=True)).values())
    for done in found:
        echo(
            f"{done.store}: {counted(done.parts_written, 'part')} written, {done.parts_already_there} there before, "
            f"{done.parts_missing} left to other workers\n"
            f"cached now: {counted(done.samples, 'sample')}, {counted(done.positions, 'position')}, "
            f"{done.written_bytes / 1e9:,.3f} GB; skipped: {lines_of(done.skipped)}"
        )


def _name_and_value(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, the value as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"--vllm-option takes NAME=VALUE, got {text!r}")
    return name.strip().replace("-", "_"), yaml.safe_load(value)


def _print_plans(options: CacheOptions, plans: "dict[str, Plan]", egress_price: float) -> None:
    """Print the estimate of every entry of a mixture, and what they take together."""
    for name, found in plans.items():
        echo(f"{name}:")
        _print_plan(options, egress_price, found)
    every = plans.values()
    echo(
        f"together: {counted(sum(found.samples for found in every), 'sample')}, about "
        f"{sum(found.device_hours for found in every):,.2f} {'GPU hours' if all(p.on_gpu for p in every) else 'hours'}, about "
        f"{sum(found.store_bytes() for found in every) / 1e9:,.3f} GB"
    )


def _when_it_pays(found: "Plan", hours: str) -> str:
    """Return from how many epochs times students on the capture is cheaper than a live teacher, in words."""
    passes = found.paying_passes
    if passes is None or isinstance(found.live_seconds, str):
        return f"not known, since a live teacher could not be timed: {found.live_seconds}"
    of_live, of_read = found.live_seconds / 3600, found.read_seconds / 3600
    figures = f"a live teacher takes about {of_live:,.2f} {hours} an epoch, reading the store {of_read:,.2f} hours of a loader"
    if math.isinf(passes):
        return f"never in time, since reading takes longer than a live teacher: {figures}"
    return f"from {passes:,.0f} epochs x students on (docs/scale.md): {figures}"


def _print_plan(options: CacheOptions, egress_price: float, found: "Plan | None" = None) -> None:
    from switchkd.pipelines.capture.dry_run import plan

    found = found or plan(options)
    free = "unknown" if found.free_bytes is None else f"{found.free_bytes / 1e9:,.1f} GB"
    kind = "GPU hours" if found.on_gpu else "hours on the CPU"
    size = found.store_bytes()
    rows = {
        "samples": f"{found.samples:,}, about {found.usable_samples:,} usable",
        "positions": f"about {found.positions:,}",
        "time": f"about {found.device_hours:,.2f} {kind}: {found.samples_per_second:,.1f} samples/s a worker"
        + (f" of {found.devices} devices" if found.devices > 1 else ""),
        "size": f"about {size / 1e9:,.3f} GB ({found.payload}), {found.bytes_per_position:,.0f} bytes a position",
        "free disk": free,
        "pays": _when_it_pays(found, "GPU hours" if found.on_gpu else "hours"),
    }
    if "://" in str(options.out):
        read = found.store_bytes(found.trained_from) / 1e9
        rows["egress"] = (
            f"about ${read * egress_price:,.2f} to train from it for one epoch ({found.trained_from}) outside, at "
            f"${egress_price:g} a GB"
        )
    rows["probe"] = f"{counted(found.probed_samples, 'random sample')} with {options.backend}; nothing was written"
    for name, value in rows.items():
        echo(f"{name:<11}{value}")
    echo("size by payload:")
    for payload, bytes_per_position in found.payload_bytes.items():
        echo(
            f"  {payload:<19}{found.store_bytes(payload) / 1e9:>12,.3f} GB{bytes_per_position:>9,.0f} bytes a position"
        )
    if found.free_bytes is not None and size > found.free_bytes:
        echo("The store would not fit.", err=True)
