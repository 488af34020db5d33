"""Training with a teacher that has another tokenizer: checks of such a run, and the map between the two vocabularies."""

import logging

from switchkd.errors import ConfigError
from switchkd.losses.cross_tokenizer import VocabMap, map_vocabularies
from switchkd.models.checkpoint import Checkpoint
from switchkd.pipelines.training.batches.dataset import OrderedSamples
from switchkd.pipelines.training.options import TrainOptions

PROBED = 64  # samples whose positions are aligned to measure how many have a partner
log = logging.getLogger(__name__)


def check_vocab_map(options: TrainOptions, teacher: Checkpoint | None, payload: str | None) -> None:
    """Check that a run with `--vocab-map` can map vocabularies.

    Raises:
        ConfigError: no teacher, a teacher whose whole logit rows are not available, or an objective that compares logits of one
            tokenizer.
    """
    if not options.vocab_map:
        return
    if teacher is None:
        raise ConfigError("--vocab-map maps the teacher's vocabulary: pass --teacher and an objective that has one")
    if payload == "topk":
        raise ConfigError("--vocab-map needs the teacher's whole rows: cache payload hidden, or --teacher-mode live")


def make_vocab_map(teacher: Checkpoint, student: Checkpoint, samples: OrderedSamples) -> VocabMap:
    """Map the vocabularies of two tokenizers, and log how much of them and of the positions is shared.

    Raises:
        ConfigError: nothing is shared.
    """
    found = map_vocabularies(student.tokenizer, teacher.tokenizer, student.vocab_rows, teacher.vocab_rows)
    aligned = samples.aligned(PROBED)
    shared = len(found.student_ids)
    log.info(
        "vocabularies: %s entries shared, %.1f %% of the student's %s and %.1f %% of the teacher's %s",
        f"{shared:,}",
        100 * shared / found.student_rows,
        f"{found.student_rows:,}",
        100 * shared / found.teacher_rows,
        f"{found.teacher_rows:,}",
    )
    log.info("positions of the first %d samples: %.1f %% of the student's have a partner", PROBED, 100 * aligned)
    if not shared or not aligned:
        raise ConfigError(
            "--vocab-map: the two tokenizers share no entry or no position, so Align has nothing to compare"
        )
    return found
