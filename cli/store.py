"""`switchkd store …`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import PATH, STORE, default_device, echo, lines_of, quiet_libraries
from switchkd.cli.options import GroupedCommand, options_of
from switchkd.counting import counted
from switchkd.pipelines.capture.options import AuditOptions
from switchkd.waits import duration

if TYPE_CHECKING:
    from switchkd.pipelines.capture.audit import AuditReport
    from switchkd.settings import StoreLocation


@click.group("store")
def command() -> None:
    """Describe, verify, repair, audit or export a teacher store."""


@command.command("info")
@click.argument("path", type=STORE)
def info(path: "StoreLocation") -> None:
    """Print a store's manifest, samples, positions, size, skipped samples and knee quantiles."""
    from switchkd.stores.info import describe

    found = describe(path)
    manifest = found.manifest
    rows = {
        "store": str(found.path),
        "parts": f"{found.parts} of {manifest.part_count}"
        + ("" if found.complete else "  (unfinished: run cache-teacher again)"),
        "samples": f"{found.samples:,} of {manifest.samples:,}",
        "skipped": lines_of(found.skipped),
        "positions": f"{found.positions:,}",
        "payload": manifest.describe_all(),
        "size": f"{counted(found.store_bytes, 'byte')} on disk, {found.bytes_per_position:.1f} a position in its arrays",
        "knee": ", ".join(f"{name} {value:,.0f}" for name, value in found.knee_quantiles.items()) or "no position",
        "format": f"version {manifest.version}, statistics of {manifest.stats_dtype or manifest.teacher['dtype']} logits",
        "teacher": ", ".join(f"{name} {value}" for name, value in manifest.teacher.items()),
        "tokenizer": manifest.tokenizer,
        "template": manifest.template["name"],
        "images": f"processor {manifest.image_processor}, "
        + (f"{counted(manifest.image_tokens, 'token')} each" if manifest.image_tokens else "tokens by their size"),
        "max length": counted(manifest.max_length, "token"),
        "data": manifest.data,
        "written by": ", ".join(f"{name} {value}" for name, value in manifest.written_by.items()),
    }
    for name, value in rows.items():
        echo(f"{name:<12}{value}")


@command.command("status")
@click.argument("path", type=STORE)
def status(path: "StoreLocation") -> None:
    """Print the progress of a capture: parts done and missing, by writer, rate and time left."""
    from switchkd.stores.status import status

    found = status(path)
    manifest = found.manifest
    rows = {
        "store": str(found.path),
        "parts": f"{len(found.done):,} of {manifest.part_count:,} done; missing: {_ranges(found.missing)}",
        "samples": f"{found.samples:,} of {manifest.samples:,}, {counted(found.positions, 'position')}",
    }
    if found.last is not None:
        rows["last"] = f"{found.last:%Y-%m-%d %H:%M:%S} UTC"
    if found.samples_per_second is not None:
        rows["rate"] = (
            f"{found.samples_per_second:,.1f} samples/s over the latest {counted(found.stretch_parts, 'part')}"
        )
    if found.missing and found.seconds_left is not None:
        rows["left"] = f"about {duration(found.seconds_left)} at that rate"
    for name, value in rows.items():
        echo(f"{name:<12}{value}")
    for writer in found.writers:
        echo(
            f"  {writer.name}  {counted(writer.parts, 'part')}, {counted(writer.samples, 'sample')}, last {writer.last:%H:%M:%S}"
        )


def _ranges(numbers: list[int]) -> str:
    """Return "0-2, 5, 7-9" of ascending numbers; at most ten ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words[:10]) + (", …" if len(words) > 10 else "") or "none"


@command.command("verify")
@click.argument("path", type=STORE)
@click.pass_context
def verify(ctx: click.Context, path: "StoreLocation") -> None:
    """Check every file, checksum, shape and statistic of a store; exit 1 if something is wrong or missing."""
    from switchkd.pipelines.progress import Progress
    from switchkd.stores import TeacherStore
    from switchkd.stores.verify import missing_parts, verify

    store = TeacherStore.open(path)
    good = bad = unreadable = 0
    with Progress("verifying", len(store.parts()), "parts") as progress:
        for part, findings in verify(store):
            for finding in findings:
                echo(f"part {part}: {finding.message}")
            if not findings:
                good += 1
            elif findings[0].unreadable:
                unreadable += 1
            else:
                bad += 1
            progress.advance(1, positions=0 if findings else store.part_positions(part))
    missing = missing_parts(store)
    if missing:
        echo(f"missing: {counted(len(missing), 'part')}, the first is {missing[0]}; run cache-teacher again")
    counts = f"{counted(good, 'part')} good, {bad} bad, {len(missing)} missing"
    echo(f"{store.path}: {counts}" + (f", {unreadable} could not be read" if unreadable else ""))
    if bad:
        echo("`switchkd store repair` drops the bad ones; cache-teacher then writes exactly these again")
    if unreadable:
        echo("what could not be read may be sound: see to the cause and run `switchkd store verify` again")
    if bad or missing or unreadable:
        ctx.exit(1)


@command.command("repair")
@click.argument("path", type=STORE)
@click.pass_context
def repair(ctx: click.Context, path: "StoreLocation") -> None:
    """Drop parts that are bad at two looks, so that running cache-teacher again writes exactly these.

    Parts that could not be read are left as they are; exit 1 then.
    """
    from switchkd.pipelines.progress import Progress
    from switchkd.stores import TeacherStore
    from switchkd.stores.verify import repair

    store = TeacherStore.open(path)
    with Progress("verifying", len(store.parts()), "parts") as progress:
        found = repair(store, lambda: progress.advance(1))
    names = ", ".join(map(str, found.dropped)) or "none"
    again = "; run cache-teacher again to write them" if found.dropped else ""
    echo(f"{store.path}: dropped parts: {names}{again}")
    if found.recovered:
        kept = ", ".join(map(str, found.recovered))
        echo(f"kept, bad at the first look and good at the second: {kept}; the disk or its connection may be failing")
    for finding in found.unreadable:
        echo(f"kept, part {finding.part}: {finding.message}")
    if found.unreadable:
        ctx.exit(1)


@command.command("audit", cls=GroupedCommand)
@click.argument("store", type=STORE, metavar="PATH")
@options_of(AuditOptions)
def audit(store: "StoreLocation", device: str | None, **options: Any) -> None:
    """Run the teacher again on random samples and report the error of the store's payloads."""
    quiet_libraries()
    from switchkd.pipelines.capture.audit import audit

    for line in _format_audit(audit(AuditOptions(store=store, device=device or default_device(), **options))):
        echo(line)


@command.command("export")
@click.argument("path", type=STORE)
@click.option("--out", type=PATH, required=True, help="A folder for the parquet files; one that was begun goes on.")
def export(path: "StoreLocation", out: Path) -> None:
    """Write a store's top-k logits as parquet: ids, log-probabilities and the rest's, a file for each part."""
    from switchkd.pipelines.progress import Progress
    from switchkd.stores import TeacherStore
    from switchkd.stores.parquet import export_parquet

    store = TeacherStore.open(path)
    written = positions = kept = 0
    with Progress("exporting", len(store), "samples") as progress:
        for done in export_parquet(store, out):
            progress.advance(done.samples, positions=done.positions)
            written, positions, kept = written + done.written, positions + done.positions, kept + (not done.written)
    missing = store.manifest.part_count - len(store.parts())
    echo(f"{out}: {counted(written, 'part')} written, {counted(positions, 'position')}; {kept:,} there already")
    if missing:
        echo(f"{counted(missing, 'part')} of {store.path} not captured yet: run cache-teacher again, and then this")


@command.command("plot")
@click.argument("path", type=STORE)
@click.option("--out", type=PATH, default=Path("store.png"), show_default=True, help="The picture.")
def plot(path: "StoreLocation", out: Path) -> None:
    """Draw a store: knee histogram, tail mass, bytes per part."""
    from switchkd.pipelines.reporting.store_plots import plot_store

    echo(f"drawn: {plot_store(path, out)}")


def _format_audit(report: "AuditReport") -> Iterator[str]:
    """Yield the report as the command line prints it: a table per student, and the verdict."""
    yield (
        f"{report.store}: {counted(report.samples, 'random sample')}, {counted(report.positions, 'position')}, "
        "against the live teacher in "
        f"{report.dtype} with float32 logits"
    )
    for student in dict.fromkeys(row.student for row in report.rows):
        yield f"student: {student}"
        yield (
            f"  {'':36}{'KL, nats':>10}{'logit error: rms':>18}{'row max':>9}{'max':>9}{'knee moved':>12}"
            f"{'recall: teacher-led':>21}{'student-led':>13}{'gradient error: logits':>24}{'states':>9}"
        )
        for row in report.rows:
            if row.student == student:
                found = row.fidelity
                yield (
                    f"  {row.name:36}{found.kl_nats:10.1e}{found.rms_error:18.4f}{found.row_error:9.4f}"
                    f"{found.largest_error:9.4f}{found.knee_moved:12.1%}{found.teacher_led_recall:21.1%}"
                    f"{found.student_led_recall:13.1%}{found.gradient_error:24.2%}{found.state_gradient_error:9.2%}"
                )
    if report.looking is not None:
        from switchkd.pipelines.visual_advantage import lines_of as lines_of_looking

        yield from lines_of_looking(report.looking)
    yield report.verdict
