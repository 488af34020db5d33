"""`switchkd store …`."""

from pathlib import Path

import click

from switchkd.cli.common import PATH, lines_of


@click.group("store")
def command() -> None:
    """Look at a teacher store."""


@command.command("info")
@click.argument("path", type=PATH)
def info(path: Path) -> None:
    """Print a store's manifest, samples, positions, size, skipped samples and knee quantiles."""
    from switchkd.stores.info import describe

    found = describe(path)
    manifest = found.manifest
    rows = {
        "store": str(found.path),
        "parts": f"{found.parts} of {manifest.part_count}"
        + ("" if found.whole else "  (unfinished: run cache-teacher again)"),
        "samples": f"{found.samples:,} of {manifest.samples:,}",
        "skipped": lines_of(found.skipped),
        "positions": f"{found.positions:,}",
        "payload": f"{manifest.payload}, k = {manifest.top_k} of {manifest.vocab_rows:,} rows, step {manifest.step:g}",
        "size": f"{found.store_bytes:,} bytes on disk, {found.bytes_per_position:.1f} a position in its arrays",
        "knee": ", ".join(f"{name} {value:,.0f}" for name, value in found.knee_quantiles.items()) or "no position",
        "teacher": ", ".join(f"{name} {value}" for name, value in manifest.teacher.items()),
        "tokenizer": manifest.tokenizer,
        "template": manifest.template["name"],
        "images": f"processor {manifest.image_processor}, {manifest.image_tokens} tokens each",
        "max length": f"{manifest.max_length} tokens",
        "data": manifest.data,
        "written by": ", ".join(f"{name} {value}" for name, value in manifest.written_by.items()),
    }
    for name, value in rows.items():
        click.echo(f"{name:<12}{value}")
