"""`switchkd data check`: report the contents of a data file, and which rows would be skipped and why, before a capture."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from switchkd.data.samples import Sample, SampleFile, Status
from switchkd.errors import ConfigError, DataError
from switchkd.pipelines.cores import workers_alone
from switchkd.pipelines.mixture import Mixture
from switchkd.pipelines.preflight.kept import BLOCK_ROWS
from switchkd.pipelines.preflight.options import CheckOptions, of_entry
from switchkd.pipelines.preflight.survey import SampleInspector, Survey, survey
from switchkd.pipelines.run_folder import write_atomically

if TYPE_CHECKING:
    from switchkd.data.encoding import SampleEncoder
    from switchkd.models.checkpoint import Checkpoint
    from switchkd.pipelines.visual_advantage import VisualAdvantage


@dataclass(frozen=True)
class DataCheck:
    """The contents of a data file."""

    rows: int
    kinds: dict[str, int]  # "one image, several turns" → rows that can be read
    survey: Survey
    lengths: NDArray[np.int64]  # of usable and over-long samples; in tokens, or in words without a model
    unit: str  # "tokens" or "words"
    limit: int | None  # max_length, if lengths are in tokens
    images_read: bool
    looking: "VisualAdvantage | None" = None  # None where it was not asked for

    @property
    def skipped(self) -> int:
        """Rows that would be skipped."""
        return int((self.survey.status != Status.OK).sum())


def check_data(options: CheckOptions) -> DataCheck:
    """Inspect every row of a data file and every image that it names.

    With a model, lengths and masks are computed with its tokenizer, template and image token count; without one, words are
    counted. One JSON line for each row that would be skipped is written to `options.report`.

    Raises:
        DataError: no such file or image folder, no usable row.
        ConfigError: the visual advantage is asked for without a model or images.
        CheckpointError: the model folder cannot be used.
    """
    found, rows = _inspect(options)
    _write_report(options.report, rows)
    return found


def check_mixture(mixture: Mixture, options: CheckOptions) -> dict[str, DataCheck]:
    """Do the same for every data file of a mixture, and return entry → contents. The report's lines name the data file.

    Raises:
        DataError, CheckpointError: see `check_data`; names the entry.
    """
    found, lines = {}, []
    for entry in mixture.entries:
        with mixture.naming(entry):
            found[entry.name], rows = _inspect(of_entry(entry, options))
            lines += [{"data": str(entry.data)} | row for row in rows]
    _write_report(options.report, lines)
    return found


def _inspect(options: CheckOptions) -> tuple[DataCheck, list[dict[str, Any]]]:
    """Return the contents of a data file, and a record of each row that would be skipped."""
    samples = SampleFile(options.data)
    looking = None
    if options.visual_advantage and (options.model is None or options.images is None):
        raise ConfigError("--visual-advantage runs a model over images: pass --model and --images")
    if options.model is not None:
        # A check without a model needs no torch, whose import takes longer than many a check.
        from switchkd.data.encoding import SampleEncoder
        from switchkd.data.load_template import load_template
        from switchkd.models.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(options.model, options.trust_remote_code)
        if options.images is None and samples.needs_folder():
            raise DataError(f"{options.data} names images: pass --images, the folder that their paths start from")
        template = load_template(options.template, checkpoint)
        encoder = SampleEncoder(checkpoint, template, options.images, options.max_length, options.max_image_pixels)
        inspector = SampleInspector(encoder)
    else:
        if options.images is not None and not options.images.is_dir():
            raise DataError(f"no image folder {options.images}")
        inspector = SampleInspector(None, options.images, options.max_image_pixels)
    workers = options.workers
    if workers is None:  # a few rows are inspected before processes have begun
        workers = workers_alone() if len(samples) > BLOCK_ROWS else 0
    found = survey(samples, inspector, workers)
    if options.model is not None:
        lengths, unit = found.tokens[np.isin(found.status, (Status.OK, Status.TOO_LONG))], "tokens"
        if options.visual_advantage:
            looking = _looking(options, samples, found, checkpoint, encoder)
    else:
        usable = np.flatnonzero(found.status == Status.OK)
        lengths, unit = np.array([_words(samples[int(row)]) for row in usable], np.int64), "words"
    skipped = [
        {"row": row, "id": samples[row].id, "reason": Status(int(found.status[row])).label, "detail": detail}
        for row, detail in found.details.items()
    ]
    check = DataCheck(
        rows=len(samples),
        kinds=dict(Counter(_kind(sample) for sample in samples if sample.status is Status.OK)),
        survey=found,
        lengths=lengths,
        unit=unit,
        limit=options.max_length if options.model is not None else None,
        images_read=options.images is not None or not samples.needs_folder(),
        looking=looking,
    )
    return check, skipped


def _looking(
    options: CheckOptions, samples: SampleFile, found: Survey, checkpoint: "Checkpoint", encoder: "SampleEncoder"
) -> "VisualAdvantage":
    """Run the model over random usable samples with an image, sharp and blurred."""
    from switchkd.data.encoded import pad_id_of
    from switchkd.models.components import lm_head_of
    from switchkd.models.vlm import freeze, load_model
    from switchkd.pipelines.visual_advantage import measure, summarise

    usable = np.flatnonzero((found.status == Status.OK) & samples.has_image())
    count = min(options.visual_advantage, len(usable))
    rows = np.sort(np.random.default_rng(0).choice(usable, count, replace=False)) if count else usable
    model = freeze(load_model(checkpoint, dtype="auto")).to(options.device)
    head = lm_head_of(model).rows(checkpoint.vocab_rows)
    chosen = [samples[int(row)] for row in rows]
    return summarise(measure(model, head, encoder, chosen, pad_id_of(checkpoint.tokenizer), options.batch_size))


def _kind(sample: Sample) -> str:
    return f"{_images_word(len(sample.images))}, {'several turns' if len(sample.turns) > 1 else 'one turn'}"


def _words(sample: Sample) -> int:
    return sum(len(text.split()) for turn in sample.turns for text in turn)


def _write_report(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _images_word(count: int) -> str:
    return ("text only", "one image")[count] if count < 2 else "several images"
