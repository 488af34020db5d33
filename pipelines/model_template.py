"""The conversation template of a model that answers: that of the run which trained it, unless another is asked for."""

import json

from switchkd.data.load_template import load_template, template_from_dict
from switchkd.data.templates import ConversationFormat
from switchkd.models.checkpoint import Checkpoint
from switchkd.pipelines.run_folder import BEST, SUMMARY


def template_of_run(checkpoint: Checkpoint) -> ConversationFormat | None:
    """Return the template that a training run records beside its last or best student; None if the checkpoint is no such one."""
    records = [path for path in (checkpoint.path / SUMMARY, checkpoint.path / BEST) if path.is_file()]
    if not records:
        return None
    made_from = json.loads(records[0].read_text(encoding="utf-8")).get("made_from")
    return template_from_dict(made_from["template"]) if made_from else None


def template_of_model(checkpoint: Checkpoint, asked: str | None) -> ConversationFormat:
    """Return the template asked for; without one, that of the run that trained the model, or `load_template`'s default.

    Raises:
        ConfigError, CheckpointError: as `load_template`.
    """
    trained_with = template_of_run(checkpoint) if asked is None else None
    return load_template(asked, checkpoint) if trained_with is None else trained_with
