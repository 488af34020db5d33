"""The index of this worker and the number of workers: from the command line, else Slurm's array, else torchrun, else 0 of 1."""

from collections.abc import Mapping

from switchkd.errors import ConfigError


def resolve_shard(given: str | None, environment: Mapping[str, str]) -> tuple[tuple[int, int], str]:
    """Return ((index, count), where it came from).

    Args:
        given: "I/N" of --shard, or None. environment: the process environment.

    Raises:
        ConfigError: not of the form I/N with 0 ≤ I < N.
    """
    if given is not None:
        return _parse(given, given.split("/")), "--shard"
    if "SLURM_ARRAY_TASK_ID" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        stride = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
        index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // stride
        return _parse(
            "SLURM_ARRAY_TASK_ID", [str(index), environment.get("SLURM_ARRAY_TASK_COUNT", "1")]
        ), "Slurm's array"
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _parse("RANK", [environment["RANK"], environment["WORLD_SIZE"]]), "RANK and WORLD_SIZE"
    return (0, 1), "one worker"


def _parse(what: str, numbers: list[str]) -> tuple[int, int]:
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"a shard is I/N with 0 ≤ I < N, got {what!r}")
    index, count = int(numbers[0]), int(numbers[1])
    if not index < count:
        raise ConfigError(f"a shard is I/N with 0 ≤ I < N, got {index}/{count} from {what!r}")
    return index, count
