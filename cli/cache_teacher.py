"""`switchkd cache-teacher`: stage one."""

import os
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import PATH, STORE, config_option, default_device, lines_of, quiet_libraries

if TYPE_CHECKING:
    from switchkd.pipelines.capture.options import CacheOptions


@click.command("cache-teacher")
@config_option
@click.option("--teacher", type=PATH, required=True, help="Checkpoint folder of the teacher (a Llava).")
@click.option("--data", type=PATH, required=True, help="Data file: LLaVA-style JSON or JSON Lines, parquet, Arrow.")
@click.option("--images", type=PATH, help="Folder that the data file's image paths start from.")
@click.option(
    "--out",
    type=STORE,
    required=True,
    help="The store, NAME.zarr or s3://BUCKET/NAME.zarr; an unfinished one is continued.",
)
@click.option(
    "--template",
    default="qwen2_base",
    show_default=True,
    help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
)
@click.option(
    "--backend",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the teacher; vllm needs an environment of its own.",
)
@click.option(
    "--payload",
    type=click.Choice(["topk", "hidden", "both"]),
    default="topk",
    show_default=True,
    help="topk: the largest logits and the mass of the rest; hidden: the final hidden state, exact for every objective.",
)
@click.option(
    "--hidden-dtype",
    type=click.Choice(["float16", "bfloat16", "int8"]),
    default="float16",
    show_default=True,
    help="How hidden states are stored; int8 has a scale per 32.",
)
@click.option("--k", type=click.IntRange(2), default=128, show_default=True, help="Logits kept per position.")
@click.option(
    "--fine",
    type=click.FloatRange(0, min_open=True),
    default=0.004,
    show_default=True,
    help="Step of a stored logit at probability 1; it grows as probability falls.",
)
@click.option(
    "--coarse",
    type=click.FloatRange(0, min_open=True),
    default=0.125,
    show_default=True,
    help="Largest step of a stored logit; its error is at most half of it.",
)
@click.option(
    "--part-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Samples per part, the unit of work and resume.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Samples per forward pass, or handed to vLLM at a time, which makes its own batches.  [default: 16; 128]",
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Longer samples are skipped, in tokens with image tokens.",
)
@click.option(
    "--image-mode",
    type=click.Choice(["own", "square", "pad"]),
    default="own",
    show_default=True,
    help="How images become square: as the checkpoint says, resized whatever the shape, or filled up with the mean colour.",
)
@click.option(
    "--max-image-pixels",
    type=click.IntRange(1),
    default=1 << 26,
    show_default=True,
    help="Larger images are skipped undecoded.",
)
@click.option("--device", help="cpu, cuda, cuda:1, …; not for vllm.  [default: cuda if there is one]")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Devices that share one teacher; vllm only.",
)
@click.option(
    "--vllm-option",
    "vllm_options",
    metavar="NAME=VALUE",
    multiple=True,
    help="Further argument of vLLM's engine, as in gpu_memory_utilization=0.8; may be repeated.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What the teacher runs in; auto is the checkpoint's own.",
)
@click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read and decode images."
)
@click.option(
    "--shard", metavar="I/N", help="Write parts I, I+N, …; else Slurm's array variables, then RANK and WORLD_SIZE."
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where workers run: this process is one, or Ray starts one a device.",
)
@click.option("--actors", type=click.IntRange(1), help="Workers that Ray starts.  [default: one a device]")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Tell positions, time, size by payload and free disk from a probe of random samples; write nothing.",
)
@click.option(
    "--egress-price",
    type=click.FloatRange(0),
    default=0.09,
    show_default=True,
    help="Dollars a GB that the dry run reckons with if --out is on an object store; ask your provider.",
)
@click.option(
    "--strict", is_flag=True, help="Stop at the first sample that cannot be used instead of recording a skip."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint.")
def command(
    shard: str | None,
    device: str | None,
    dry_run: bool,
    egress_price: float,
    batch_size: int | None,
    vllm_options: tuple[str, ...],
    **options: Any,
) -> None:
    """Store what a teacher says about every supervised position of a data file.

    Run it again to continue after an interruption, or on several machines at once; a part that is there is never written
    twice.
    """
    from switchkd.pipelines.capture.backends.base import BATCH_SIZES
    from switchkd.pipelines.capture.cache_teacher import cache_teacher
    from switchkd.pipelines.capture.options import CacheOptions
    from switchkd.pipelines.capture.sharding import resolve_shard

    vllm = options["backend"] == "vllm"
    if vllm and device is not None:
        raise click.UsageError("--device is not for vllm, which takes the devices it sees: set CUDA_VISIBLE_DEVICES")

    quiet_libraries()
    ray = options["engine"] == "ray"
    which, source = resolve_shard(shard, {} if ray else os.environ)
    if not ray:
        click.echo(f"worker {which[0]} of {which[1]} (from {source})", err=True)
    resolved = CacheOptions(
        shard=which,
        # Asking for CUDA here would keep vLLM's processes from forking.
        device=device or ("cpu" if vllm else "auto" if ray and not dry_run else default_device()),
        batch_size=batch_size or BATCH_SIZES[options["backend"]],
        vllm_options=tuple(_name_and_value(text) for text in vllm_options),
        **options,
    )
    if dry_run:
        _print_plan(resolved, egress_price)
        return
    done = cache_teacher(resolved)
    click.echo(
        f"{done.store}: {done.parts_written} parts written, {done.parts_already_there} were there, "
        f"{done.parts_missing} left to other workers\n"
        f"cached now: {done.samples:,} samples, {done.positions:,} positions, "
        f"{done.written_bytes / 1e9:,.3f} GB; skipped: {lines_of(done.skipped)}"
    )


def _name_and_value(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, the value as YAML has it."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"--vllm-option takes NAME=VALUE, got {text!r}")
    return name.strip().replace("-", "_"), yaml.safe_load(value)


def _print_plan(options: "CacheOptions", egress_price: float) -> None:
    from switchkd.pipelines.capture.dry_run import plan

    found = plan(options)
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
    }
    if "://" in str(options.out):
        rows["egress"] = (
            f"about ${size / 1e9 * egress_price:,.2f} to read it once from outside, at ${egress_price:g} a GB"
        )
    rows["probe"] = f"{found.probed_samples} random samples with {options.backend}; nothing was written"
    for name, value in rows.items():
        click.echo(f"{name:<11}{value}")
    click.echo("size by payload:")
    for payload, bytes_per_position in found.payload_bytes.items():
        click.echo(
            f"  {payload:<19}{found.store_bytes(payload) / 1e9:>12,.3f} GB{bytes_per_position:>9,.0f} bytes a position"
        )
    if found.free_bytes is not None and size > found.free_bytes:
        click.echo("The store would not fit.", err=True)
