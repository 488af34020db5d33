"""The manifest of a store, built from the inputs and options of a capture."""

from dataclasses import replace
from typing import cast, get_args

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile, Status
from switchkd.errors import ConfigError
from switchkd.fingerprints import hash_image_processor, hash_tokenizer
from switchkd.models.checkpoint import Checkpoint, teacher_identity
from switchkd.pipelines.capture.backends.base import software_of
from switchkd.pipelines.capture.options import DEFAULT_HIDDEN_DTYPE, DEFAULT_PAYLOAD, CacheOptions
from switchkd.pipelines.visual_advantage import BLUR
from switchkd.settings import HiddenDtype, PayloadName
from switchkd.stores import Manifest
from switchkd.stores.layout import STATS_DTYPE
from switchkd.stores.reader import read_manifest
from switchkd.stores.storage.open import open_storage


def resolve_payload(options: CacheOptions) -> CacheOptions:
    """Return the options with payload and dtype of hidden states set: those of a store begun at `out`, else the defaults.

    Raises:
        ConfigError: the store was begun with states as int8, which are only read.
        StoreError: what lies at `out` is not a store. RunError: an object store cannot be reached.
    """
    payload, dtype = options.payload, options.hidden_dtype
    if (payload is None or dtype is None) and open_storage(options.out).exists():
        begun = read_manifest(options.out)
        payload = payload or cast(PayloadName, begun.payload)
        if begun.hidden_dtype and dtype is None:
            if begun.hidden_dtype not in get_args(HiddenDtype):
                raise ConfigError(
                    f"{options.out} was begun with hidden states in {begun.hidden_dtype}, which is read but no longer written: "
                    "train from it as it is, or cache into another --out"
                )
            dtype = cast(HiddenDtype, begun.hidden_dtype)
    return replace(options, payload=payload or DEFAULT_PAYLOAD, hidden_dtype=dtype or DEFAULT_HIDDEN_DTYPE)


def build_manifest(
    options: CacheOptions, checkpoint: Checkpoint, encoder: SampleEncoder, samples: SampleFile
) -> Manifest:
    """Return the manifest of the store that a capture with these options, which are resolved, writes."""
    assert options.payload is not None and options.hidden_dtype is not None
    topk, hidden = options.payload in ("topk", "both"), options.payload in ("hidden", "both")
    return Manifest(
        payload=options.payload,
        top_k=min(options.k, checkpoint.vocab_rows) if topk else 0,
        fine=options.fine if topk else 0.0,
        coarse=options.coarse if topk else 0.0,
        hidden_dtype=options.hidden_dtype if hidden else "",
        hidden_width=checkpoint.config.text_config.hidden_size if hidden else 0,
        vocab_rows=checkpoint.vocab_rows,
        samples=len(samples),
        part_size=options.part_size,
        teacher=teacher_identity(checkpoint) | {"dtype": checkpoint.resolve_dtype(options.dtype)},
        tokenizer=hash_tokenizer(checkpoint.tokenizer),
        template=encoder.template.as_dict(),
        image_processor=hash_image_processor(checkpoint.image_processor),
        image_tokens=checkpoint.image_tokens,
        max_length=options.max_length,
        max_image_pixels=options.max_image_pixels,
        data=samples.fingerprint,
        statuses={str(int(status)): status.label for status in Status},
        written_by=software_of(options.backend)
        | {"image_mode": options.image_mode}
        | ({} if checkpoint.quantization is None else {"quantization": checkpoint.quantization})
        | ({} if options.max_pixels is None else {"max_pixels": str(options.max_pixels)}),
        hidden_error=options.hidden_error if hidden and options.hidden_dtype == "steps" else 0.0,
        stats_dtype=STATS_DTYPE,
        visual_advantage=BLUR if options.visual_advantage else 0.0,
    )


def with_payload(both: Manifest, payload: PayloadName) -> Manifest:
    """Return the manifest of a store with both payloads, or the one that it would have with one of them alone."""
    if payload == "topk":
        return replace(both, payload=payload, hidden_dtype="", hidden_width=0, hidden_error=0.0)
    return both if payload == "both" else replace(both, payload=payload, top_k=0, fine=0.0, coarse=0.0)
