"""The manifest of a store, built from the inputs and options of a capture."""

from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile, Status
from switchkd.fingerprints import hash_image_processor, hash_tokenizer
from switchkd.models.checkpoint import Checkpoint, teacher_identity
from switchkd.pipelines.capture.backends.base import software_of
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.stores import Manifest


def build_manifest(
    options: CacheOptions, checkpoint: Checkpoint, encoder: SampleEncoder, samples: SampleFile
) -> Manifest:
    """Return the manifest of the store that a capture with these options writes."""
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
        written_by=software_of(options.backend) | {"image_mode": options.image_mode},
    )
