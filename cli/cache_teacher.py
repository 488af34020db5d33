"""`switchkd cache-teacher`: stage one."""

import os
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import PATH, STORE, config_option, default_device, lines_of, quiet_libraries

if TYPE_CHECKING:
    from switchkd.pipelines.cache_teacher import CacheOptions


@click.command("cache-teacher")
@config_option
@click.option("--teacher", type=PATH, required=True, help="Checkpoint folder of the teacher (a Llava).")
@click.option("--data", type=PATH, required=True, help="LLaVA-style JSON or JSON Lines.")
@click.option("--images", type=PATH, help="Folder that the data file's image paths start from.")
@click.option(
    "--out",
    type=STORE,
    required=True,
    help="The store, NAME.zarr or s3://BUCKET/NAME.zarr; an unfinished one is continued.",
)
@click.option(
    "--template", default="qwen2_base", show_default=True, help="Conversation template: a name or a JSON file."
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
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Samples per forward pass.")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Longer samples are skipped, in tokens with image tokens.",
)
@click.option(
    "--max-image-pixels",
    type=click.IntRange(1),
    default=1 << 26,
    show_default=True,
    help="Larger images are skipped undecoded.",
)
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: cuda if there is one]")
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
    "--dry-run", is_flag=True, help="Tell size, free disk and time from a probe of random samples; write nothing."
)
@click.option(
    "--strict", is_flag=True, help="Stop at the first sample that cannot be used instead of recording a skip."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint.")
def command(shard: str | None, device: str | None, dry_run: bool, **options: Any) -> None:
    """Store what a teacher says about every supervised position of a data file.

    Run it again to continue after an interruption, or on several machines at once; a part that is there is never written
    twice.
    """
    from switchkd.pipelines.cache_teacher import CacheOptions, cache_teacher
    from switchkd.pipelines.sharding import resolve_shard

    quiet_libraries()
    which, source = resolve_shard(shard, os.environ)
    click.echo(f"worker {which[0]} of {which[1]} (from {source})", err=True)
    resolved = CacheOptions(shard=which, device=device or default_device(), **options)
    if dry_run:
        _print_plan(resolved)
        return
    done = cache_teacher(resolved)
    click.echo(
        f"{done.store}: {done.parts_written} parts written, {done.parts_already_there} were there, "
        f"{done.parts_missing} left to other workers\n"
        f"cached now: {done.samples:,} samples, {done.positions:,} positions, "
        f"{done.written_bytes / 1e9:,.3f} GB; skipped: {lines_of(done.skipped)}"
    )


def _print_plan(options: "CacheOptions") -> None:
    from switchkd.pipelines.dry_run import plan

    found = plan(options)
    free = "unknown" if found.free_bytes is None else f"{found.free_bytes / 1e9:,.1f} GB"
    rows = {
        "samples": f"{found.samples:,}, about {found.usable_samples:,} usable",
        "positions": f"about {found.positions:,}",
        "size": f"about {found.store_bytes / 1e9:,.3f} GB, {found.bytes_per_position:,.0f} bytes a position",
        "free disk": free,
        "time": f"about {found.seconds / 3600:,.2f} hours for one worker, {found.samples_per_second:,.1f} samples/s",
        "probe": f"{found.probed_samples} random samples on {options.device}; nothing was written",
    }
    for name, value in rows.items():
        click.echo(f"{name:<11}{value}")
    if found.free_bytes is not None and found.store_bytes > found.free_bytes:
        click.echo("The store would not fit.", err=True)
