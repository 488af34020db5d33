"""Write docs/commands.md, every command and option, from the click commands themselves: `python docs/site/commands.py`."""

from collections.abc import Iterator
from pathlib import Path

import click

from switchkd.cli.main import main
from switchkd.cli.options import grouped

PAGE = Path(__file__).parents[1] / "commands.md"
HEAD = """# Every command and option

Made from the commands themselves by `make commands`; a test compares the two. `--help` prints the same.

Exit codes: 0 done, 2 wrong usage or input, 1 a failed run, 130 interrupted, 143 ended by a
scheduler's signal. Run the same command again after an interruption.
"""


def page() -> str:
    """Return the page's Markdown."""
    return HEAD + "".join(f"\n{section(context)}" for context in walk(click.Context(main, info_name="switchkd")))


def walk(context: click.Context) -> Iterator[click.Context]:
    """Yield every command below a group, in the group's order; a group of its own before its commands."""
    group = context.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        child = click.Context(command, info_name=name, parent=context)
        yield child
        if isinstance(command, click.Group):
            yield from walk(child)


def section(context: click.Context) -> str:
    """Return heading, usage, help text and the options of one command."""
    command = context.command
    depth = context.command_path.count(" ") + 1
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"{'#' * depth} {context.command_path}", "", "```text", usage, "```", ""]
    lines += [_cell(" ".join(part.split())) + "\n" for part in (command.help or "").split("\n\n")]
    groups = {
        title: [option for option in options if "--help" not in option.opts]
        for title, options in grouped(command, context).items()
    }
    for title, options in groups.items():
        if options:
            lines += [f"**{title}**", ""] if len(groups) > 1 else []
            lines += ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [_row(option, context) for option in options]
            lines.append("")
    return "\n".join(lines)


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    meaning, _, told = (option.help or "").partition("  [default: ")
    default = option.get_help_extra(context).get("default", "") or told.removesuffix("]")
    default = "**required**" if option.required else _cell(default)
    several = " May be given several times." if option.multiple else ""
    return f"| {names} | {_value(option, context)} | {default} | {_cell(' '.join(meaning.split()))}{several} |"


def _value(option: click.Option, context: click.Context) -> str:
    """Return what stands for an option's value: its choices, or its type with a number's bounds."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    name = option.make_metavar(context).replace(" RANGE", "")
    bounds = option.get_help_extra(context).get("range")
    return f"`{name}`" + (f", {_cell(bounds)}" if bounds else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    click.echo(f"written: {PAGE}")
