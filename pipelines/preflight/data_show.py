"""`switchkd data show`: print the exact text and mask of samples, as the models read them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template
from switchkd.data.samples import BadSample, Sample, SampleFile
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.mixture import Mixture
from switchkd.pipelines.preflight.options import ShowOptions, of_entry


@dataclass(frozen=True)
class Span:
    """A span of consecutive tokens of one kind."""

    text: str
    kind: str  # "prompt", "supervised" or "image"
    ids: list[int]
    pieces: list[str]  # the tokenizer's entry of each id, in which "▁" or "Ġ" is a space

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class ShownSample:
    """One sample as a model reads it."""

    row: int
    id: str
    image: str | None
    spans: list[Span]  # their texts, concatenated, are the sample's text
    problem: str = ""  # why it cannot be used
    stands_in: bool = (
        False  # whether the image's tokens are those of a made-up one, since its own number was not looked up
    )

    def tokens(self, kind: str = "") -> int:
        """Return the number of tokens, of one kind or of all."""
        return sum(span.tokens for span in self.spans if kind in ("", span.kind))


def show_data(options: ShowOptions) -> Iterator[ShownSample]:
    """Yield n samples from row `start` on.

    Without an image folder, images below it are not read. Where their number of tokens depends on the image, that of a made-up
    image is shown then.

    Raises:
        InputError: data file, model or template cannot be used.
    """
    checkpoint = open_checkpoint(options.model, options.trust_remote_code)
    samples = SampleFile(options.data)
    encoder = SampleEncoder(checkpoint, load_template(options.template, checkpoint), options.images, options.max_length)
    for row in range(options.start, min(options.start + options.n, len(samples))):
        yield _shown(encoder, samples[row])


def show_mixture(mixture: Mixture, options: ShowOptions) -> Iterator[tuple[str, ShownSample]]:
    """Yield (name of the entry, sample), n samples from row `start` on of every data file of a mixture.

    Raises:
        InputError: see `show_data`; names the entry.
    """
    for entry in mixture.entries:
        with mixture.naming(entry):
            for sample in show_data(of_entry(entry, options)):
                yield entry.name, sample


def _shown(encoder: SampleEncoder, sample: Sample) -> ShownSample:
    reads = encoder.images is not None or (encoder.reader.is_variable and sample.embedded is not None)
    try:
        if reads:
            encoded = encoder.encode(sample, pixels=False)
            spans = _spans(encoder, encoded.input_ids, encoded.supervised)
        else:
            spans = _spans(encoder, *encoder.encode_text(sample))
    except BadSample as bad:
        return ShownSample(sample.index, sample.id, sample.image, [], str(bad))
    stands_in = not reads and encoder.reader.is_variable and any(span.kind == "image" for span in spans)
    return ShownSample(sample.index, sample.id, sample.image, spans, stands_in=stands_in)


def _spans(encoder: SampleEncoder, ids: NDArray[np.int32], supervised: NDArray[np.bool_]) -> list[Span]:
    kinds = np.where(ids == encoder.image_token_id, "image", np.where(supervised, "supervised", "prompt"))
    borders = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1), len(ids)]
    spans = []
    for begin, end in pairwise(borders):
        shown: list[int] = ids[begin:end].tolist()
        text = encoder.tokenizer.decode(shown, skip_special_tokens=False)
        spans.append(Span(text, str(kinds[begin]), shown, encoder.tokenizer.convert_ids_to_tokens(shown)))
    return spans
