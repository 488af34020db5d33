"""Definition of options: each is one field of a dataclass, with its type, default, bounds, help and position in the help.

    @options_class
    class TrainOptions:
        lr: float = option(default=2e-5, above=0, group="optimisation", help="Peak learning rate.")

That field defines the click option (`cli/options.py`), the keys of `--config` and recipes (`value_of_option`), the check when an
instance is created from any code, the record in run.yaml and the row in docs/commands.md.

pydantic's dataclasses check the fields: they are ordinary dataclasses (`replace`, `asdict`, pickles), support `Literal`, unions and
bounds, and take 0.1 s to import. pydantic's errors are converted to `ConfigError` with messages of this package.
"""

import types
import typing
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, dataclass_transform

import annotated_types
import pydantic
import pydantic.dataclasses
from pydantic.fields import FieldInfo

from switchkd.errors import ConfigError, SwitchKDError

T = TypeVar("T")
REQUIRED: Any = ...
# What must exist at a path before a command begins, see `given.py`.
Named = Literal["checkpoint", "model folder", "data", "images", "image", "folder", "store"]


@dataclass(frozen=True)
class Shown:
    """How a field is shown on the command line.

    Args:
        group: heading of the help under which it is listed.
        unset: what its absence means, if the command line has no default: shown as [default: …]; "" shows nothing.
        metavar: placeholder of its value in the help.
        flag: the option's name if it is not the field's, or "-n, --name"; with `multiple` it may be given several times.
        hidden: whether the command line has no such option.
        names: what must exist at its path; None for a path that is written, or that may be missing.
    """

    group: str = ""
    unset: str | None = None
    metavar: str | None = None
    flag: str | None = None
    multiple: bool = False
    hidden: bool = False
    names: Named | None = None


def option(
    *,
    default: Any = REQUIRED,
    help: str = "",
    group: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    unset: str | None = None,
    metavar: str | None = None,
    flag: str | None = None,
    multiple: bool = False,
    hidden: bool = False,
    names: Named | None = None,
) -> Any:
    """Declare one option as the default of a dataclass field, in a class made by `options_class`.

    Args:
        default: of the field; without one it must be given. A dict, list or set is copied for every instance.
        help: one or two sentences. at_least, above, at_most: bounds of a number.
        group, unset, metavar, flag, multiple, hidden, names: see `Shown`.
    """
    shown = Shown(group, unset, metavar, flag, multiple, hidden, names)
    settings: dict[str, Any] = {"description": help, "ge": at_least, "gt": above, "le": at_most}
    settings["json_schema_extra"] = {"shown": cast(Any, shown)}
    if isinstance(default, dict | list | set):
        return pydantic.Field(default_factory=lambda: type(default)(default), **settings)
    return pydantic.Field(default, **settings)


@dataclass_transform(field_specifiers=(option,), frozen_default=True)
def options_class(cls: type[T]) -> type[T]:
    """Make a frozen dataclass of options that are checked when an instance is created.

    Creating an instance may raise ConfigError, which names the option, its valid values and the value found. A method
    `__post_init__` checks conditions between options.
    """
    return _checked(cls, kw_only=False)


@dataclass_transform(field_specifiers=(option,), frozen_default=True, kw_only_default=True)
def keyword_options_class(cls: type[T]) -> type[T]:
    """Make the same with keyword-only fields, so that a subclass may add fields without a default."""
    return _checked(cls, kw_only=True)


def _checked(cls: type[T], kw_only: bool) -> type[T]:
    config = pydantic.ConfigDict(extra="forbid")
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=kw_only, config=config)(cls)
    checked = made.__init__

    def initialise(self: Any, *values: Any, **named: Any) -> None:
        try:
            checked(self, *values, **named)
        except pydantic.ValidationError as error:
            raise _as_config_error(error, made) from None

    initialise.__doc__ = f"Check and keep the options of {cls.__name__}; raises ConfigError."
    made.__init__ = initialise
    return cast(type[T], made)


def fields_of(kind: type) -> dict[str, FieldInfo]:
    """Return the fields of an options class, by name."""
    found: dict[str, FieldInfo] = kind.__pydantic_fields__  # type: ignore[attr-defined]
    return found


def shown(field: FieldInfo) -> Shown:
    """Return how a field is shown on the command line."""
    extra = field.json_schema_extra
    found: Any = extra.get("shown", Shown()) if isinstance(extra, dict) else Shown()
    return cast(Shown, found)


def bounds(field: FieldInfo) -> tuple[float | None, float | None, float | None]:
    """Return (at least, above, at most) of a number; None if it has no such bound."""
    found: dict[type, Any] = {type(bound): bound for bound in field.metadata}
    least, above, most = (found.get(kind) for kind in (annotated_types.Ge, annotated_types.Gt, annotated_types.Le))
    return (least and least.ge, above and above.gt, most and most.le)


def value_of_option(kind: type, name: str, value: Any) -> Any:
    """Convert one value to the type of its option, for example from YAML, where 1e-3 and a path are text.

    Raises:
        ConfigError: the class has no such option, or its type or bounds do not allow the value.
    """
    field = fields_of(kind).get(name)
    if field is None:
        raise ConfigError(f"no option {name!r}; there are {', '.join(fields_of(kind))}")
    if isinstance(value, bool) and field.annotation not in (bool, bool | None):
        raise ConfigError(f"{name} cannot be {value!r}: it {_wanted(field)}")
    holder: Any = pydantic.create_model("Holder", **cast(Any, {name: (field.annotation, copy(field))}))
    try:
        return getattr(holder(**{name: value}), name)
    except pydantic.ValidationError:
        raise ConfigError(f"{name} cannot be {value!r}: it {_wanted(field)}") from None


def _as_config_error(error: pydantic.ValidationError, kind: Any) -> SwitchKDError:
    """Return pydantic's first error as a ConfigError; an error raised by `__post_init__` is returned unchanged."""
    first = error.errors()[0]
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, SwitchKDError):
        return raised
    where = first["loc"][0]  # a number for a positional value
    name = list(fields_of(kind))[where] if isinstance(where, int) and where < len(fields_of(kind)) else str(where)
    field = fields_of(kind).get(name)
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(f"{name} is needed: pass --{name.replace('_', '-')}")
    if field is None:
        return ConfigError(f"no option {name!r}; there are {', '.join(fields_of(kind))}")
    return ConfigError(f"{name} {_wanted(field)}, got {first['input']!r}")


def _wanted(field: FieldInfo) -> str:
    """Return a field's valid values, as the end of a sentence that begins with its name."""
    kinds = [kind for kind in kinds_of(field.annotation) if kind is not type(None)]
    if words := [word for kind in kinds for word in words_of(kind)]:
        return f"is {words[0]} or {words[1]}" if len(words) == 2 else f"is one of {', '.join(words)}"
    least, above, most = bounds(field)
    named = {"at least": least, "above": above, "at most": most}
    limits = [f"{name} {bound:g}" for name, bound in named.items() if bound is not None]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    what = " or ".join(dict.fromkeys(names.get(kind, "a path" if "Path" in str(kind) else str(kind)) for kind in kinds))
    return " ".join([f"should be {what}", " and ".join(limits)]).strip()


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or a list of the annotation itself."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if union else (annotation,)


def words_of(kind: Any) -> tuple[str, ...]:
    """Return the values of a Literal, or of the members of a tuple of any length; none for another type."""
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,):
        kind = typing.get_args(kind)[0]
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
