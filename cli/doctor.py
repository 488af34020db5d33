"""`switchkd doctor`."""

import click

from switchkd.cli.common import echo, quiet_libraries


@click.command("doctor")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Report what this machine has, what is broken, and what each command lacks; exit 1 if something is broken."""
    quiet_libraries()
    from switchkd.pipelines.doctor import examine

    marks = {"ok": ("ok  ", "green"), "note": ("-   ", "yellow"), "bad": ("BAD ", "red")}
    area, bad = "", 0
    for finding in examine():
        if finding.area != area:
            area = finding.area
            click.echo(f"{area}")
        mark, colour = marks[finding.verdict]
        click.echo(f"  {click.style(mark, fg=colour)}{finding.what}")
        if finding.advice:
            echo(f"      {finding.advice}")
        bad += finding.verdict == "bad"
    if bad:
        click.echo(f"{bad} broken")
        ctx.exit(1)
