"""Creation of click options from the fields of an options class, and grouped help."""

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import click

from switchkd.cli.common import PATH, STORE
from switchkd.pipelines import options as declared
from switchkd.pipelines.given import require_given

F = TypeVar("F", bound=Callable[..., Any])
OTHER = "Other options"


class GroupedOption(click.Option):
    """An option that is listed under a heading of the help."""

    def __init__(self, *names: Any, group: str = "", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help shows options under the headings of their groups, in the order in which they first appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group; options without a group come last."""
        for title, options in grouped(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl([row for option in options if (row := option.get_help_record(ctx)) is not None])


def grouped(command: click.Command, ctx: click.Context) -> dict[str, list[click.Option]]:
    """Return a command's visible options by heading."""
    found: dict[str, list[click.Option]] = {}
    other: list[click.Option] = []
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option) and not parameter.hidden:
            group = getattr(parameter, "group", "")
            (found.setdefault(group, []) if group else other).append(parameter)
    return found | ({OTHER if found else "Options": other} if other else {})


def options_of(
    kind: type,
    *,
    leave_out: Collection[str] = (),
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    check_paths: bool = True,
) -> Callable[[F], F]:
    """Add an option for every field of an options class, in the order of the groups in which its fields first appear.

    Args:
        kind: made by `pipelines.options.options_class`.
        leave_out: fields that this command does not offer.
        changes: settings of `click.option` that differ for this command, by field.
        check_paths: whether the paths are checked before the command is called, which may import what takes seconds.
    """
    own = vars(kind).get("__annotations__", {})  # come before those that it inherits
    fields = {name: field for name, field in declared.fields_of(kind).items() if name not in leave_out}
    fields = dict(sorted(fields.items(), key=lambda entry: entry[0] not in own))
    made = [
        _option(name, field, (changes or {}).get(name, {}))
        for name, field in fields.items()
        if not declared.shown(field).hidden
    ]
    order = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in made))}

    def add(command: F) -> F:
        in_order = sorted(made, key=lambda entry: order[entry[0]])
        for _, decorate in reversed(in_order):  # click lists the option added last first
            command = decorate(command)
        return command

    def add_checked(command: F) -> F:
        @wraps(command)
        def checked(*values: Any, **named: Any) -> Any:
            require_given(kind, named)
            return command(*values, **named)

        return add(cast(F, checked))

    return add_checked if check_paths else add


def _option(name: str, field: Any, changes: Mapping[str, Any]) -> tuple[str, Callable[[F], F]]:
    """Return (group, the decorator that adds one field's option)."""
    shown = declared.shown(field)
    *short, flag = (shown.flag or "--" + name.replace("_", "-")).split(", ")
    required = field.is_required()
    default = None if required or shown.unset is not None else field.get_default(call_default_factory=True)
    text = "  ".join(filter(None, [field.description, f"[default: {shown.unset}]" if shown.unset else ""]))
    settings: dict[str, Any] = {
        "type": _type(field),
        "help": text or None,
        "required": required,
        "metavar": shown.metavar,
        "group": shown.group,
        "cls": GroupedOption,
    }
    names = [*short, flag, name]
    if field.annotation in (bool, bool | None):
        settings |= {"is_flag": True, "type": None}
        if default or field.annotation is not bool:
            names = [f"{flag}/--no-{flag.removeprefix('--')}", name]
            settings["default"] = default
    if shown.multiple:
        settings["multiple"] = True
    elif default is not None and default is not False:
        settings |= {"default": default, "show_default": True}
    return shown.group, click.option(*names, **{**settings, **changes})


def _type(field: Any) -> Any:
    """Return the click type of a field: a choice of words, a number within bounds, a path."""
    kinds = [kind for kind in declared.kinds_of(field.annotation) if kind is not type(None)]
    if len(kinds) == 1 and get_origin(kinds[0]) is tuple and declared.shown(field).multiple:
        kinds = [get_args(kinds[0])[0]]  # of each value
    if words := [word for kind in kinds for word in declared.words_of(kind)]:
        return click.Choice(words)
    least, above, most = declared.bounds(field)
    if kinds in ([int], [float]):
        low = above if least is None else least
        whole = kinds == [int]
        if low is None and most is None:
            return int if whole else float
        kind: Any = click.IntRange if whole else click.FloatRange
        return kind(low, most, min_open=above is not None)
    if kinds == [Path]:
        return PATH
    return STORE if Path in kinds else None
