"""Configurations that come with the package: one file for each command and pair of models, `recipes/COMMAND/NAME.yaml`.

`--config switchkd:NAME` takes one. Each is an ordinary configuration file, so a copy of it can be changed and passed by its path.
"""

from pathlib import Path

from switchkd.errors import ConfigError

PREFIX = "switchkd:"
RECIPES = Path(__file__).parent / "recipes"


def recipe_names(command: str) -> list[str]:
    """Return the names of the recipes of a command, in alphabetical order; none for a command without recipes."""
    return sorted(path.stem for path in (RECIPES / command).glob("*.yaml"))


def recipe_path(command: str, name: str) -> Path:
    """Return the file of a recipe.

    Args:
        command: as it is typed, "train" or "cache-teacher". name: without prefix and ending.

    Raises:
        ConfigError: there is no such recipe; lists those that there are.
    """
    names = recipe_names(command)
    if name in names:
        return RECIPES / command / f"{name}.yaml"
    if not names:
        raise ConfigError(f"`switchkd {command}` has no recipes: pass the path of a YAML file, not {PREFIX}{name}")
    raise ConfigError(f"no recipe {name!r} for `switchkd {command}`; there are {', '.join(names)}")
