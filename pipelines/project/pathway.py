"""Which settings a pair of models trains with: the first of a few that its configs, tokenizers and image processors allow."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from switchkd.data.media import MediaReader
from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.families import family_of
from switchkd.pipelines.training.inputs import check_models
from switchkd.pipelines.training.model_setup import make_switch_adapter
from switchkd.pipelines.training.options import TrainOptions


@dataclass(frozen=True)
class Pathway:
    """Options of `switchkd train` that follow from the two models."""

    options: dict[str, Any]  # by name; empty where the defaults fit
    meaning: str  # what they do, a sentence
    reason: str  # why the defaults, or what is tried before, do not fit; "" where they do


_DIRECT = "The student's vision features enter the teacher's projector as they are, so Align and VSD both train."
_ADAPTER = (
    "One linear map, trained with the student, brings its vision features to the teacher's width and number, so Align and VSD both "
    "train."
)
_NO_SWITCH = "Align alone trains; there is no VSD, whose switch pathway this pair does not have."
_MAPPED = " Vocabulary entries and positions that stand for the same text are compared, since the tokenizers differ."


def choose_pathway(options: TrainOptions, teacher: Checkpoint, student: Checkpoint) -> Pathway:
    """Return the first settings that fit: the switch pathway, with an adapter, without it; then the same with a vocabulary map.

    No weights are read. For a student of a family where VSD teaches nothing, the switch pathway is off.

    Args:
        options: of the run, with nothing said of the switch pathway and the vocabulary map.

    Raises:
        CheckpointError: the pair fits with none of them; it is the error of the first one.
    """
    note = family_of(student.config, student.path).switch_note
    first: CheckpointError | None = None
    for found, meaning in _settings(bool(note)):
        try:
            _check(replace(options, **found), teacher, student)
        except CheckpointError as error:
            first = first or error
            continue
        return Pathway(found, meaning, note if first is None else str(first))
    assert first is not None
    raise first


def _settings(switch_off: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (options, what they do), in the order in which they are tried."""
    for mapped, words in (({}, ""), ({"vocab_map": True}, _MAPPED)):
        if not switch_off:
            yield mapped, _DIRECT + words
            yield {"switch_adapter": "linear", **mapped}, _ADAPTER + words
        yield {"switch": False, **mapped}, _NO_SWITCH + words


def _check(options: TrainOptions, teacher: Checkpoint, student: Checkpoint) -> None:
    """Raise CheckpointError if the pair does not fit these options."""
    options = replace(options, switch=options.switch is not False)
    check_models(options, student, teacher)
    if options.switch_adapter is not None:
        readers = [MediaReader(side) for side in (student, teacher)]
        media, teacher_media = (reader.probe.columns if reader.is_variable else None for reader in readers)
        make_switch_adapter(options, teacher, student, media, teacher_media)
