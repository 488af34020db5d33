"""`switchkd report`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import STORE, default_device, echo, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.pipelines.reporting.options import ReportOptions

if TYPE_CHECKING:
    from switchkd.pipelines.reporting.report import Report


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@options_of(ReportOptions)
def command(runs: tuple[str, ...], device: str | None, **given: Any) -> None:
    """Write one HTML page, and PNGs, about training runs, evaluations and stores.

    RUN is a folder that `train`, `eval` or `cache-teacher` wrote, or one that contains several of them, such as demo-run; or
    LABEL=RUN. The page needs no other file and no network. Sections without data are left out, with a line that explains
    how to obtain it.
    """
    quiet_libraries()
    from switchkd.pipelines.reporting.report import report

    options = ReportOptions(
        runs=tuple(_labelled(run) for run in runs),
        device=(device or default_device()) if given["knees"] else "cpu",
        **given,
    )
    for line in _format_report(report(options)):
        echo(line)


def _labelled(text: str) -> tuple[str | None, Path | str]:
    """Split LABEL=RUN; a "=" after a slash belongs to the path."""
    label, equals, place = text.partition("=")
    if not equals or "/" in label:
        label, place = "", text
    return label or None, STORE.convert(place, None, None)


def _format_report(done: "Report") -> Iterator[str]:
    """Yield the lines that the command line prints."""
    yield f"{done.page}: {len(done.pictures)} pictures beside it"
    for line in done.missing:
        yield f"  {line}"
