"""Teachers of many families that vLLM's CPU kernels take, and data for them: images of several sizes, text only, several turns.

Used by the tests of the vLLM backend and by the table that compares it with transformers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import families as tiny
import numpy as np
from PIL import Image

from switchkd.data.encoded import EncodedSample
from switchkd.pipelines.capture.backends import vllm_pooler
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker

# vLLM's attention on a CPU takes heads of 32 numbers and more.
WIDTH = 128
TEXT = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
}
TOWER = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 96}
PATCHES = {"hidden_size": 128, "num_heads": 4, "out_hidden_size": WIDTH}
TOWERS = {
    "qwen2_vl": {"embed_dim": 128, "num_heads": 4, "hidden_size": WIDTH},
    "mistral3": TOWER | {"head_dim": 32},
    "paligemma": TOWER | {"projection_dim": WIDTH},
}
TEXTS = {"qwen3_vl_moe": {"norm_topk_prob": True}}  # as in published configs; transformers has no other way
MORE = {"paligemma": {"projection_dim": WIDTH, "hidden_size": WIDTH}}
FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "internvl",
    "smolvlm",
    "idefics3",
    "mistral3",
)
MAX_LENGTH = 256
BLOCK = 32  # tokens of a block of the prefix cache
CHUNK = 32  # tokens of a step, less than most images and all prompts
# vLLM sizes its cache of features by an image that it holds for the largest of this family. A tiny model's may be larger than that.
CHUNKS = {"llava_onevision": 96}
SIZES = ((32, 24), (20, 40), (50, 50), (64, 20))
TEXT_ONLY, TWO_TURNS = (3, 7), (4, 7)
SEVERAL = (
    ((0, 1), ("<image>\n<image>\nwhat is the color of a thing?", "a red cat sits on the mat.")),
    ((2, 3), ("<image>\nwhat is this?", "a blue dog."), ("a red thing, <image> this?", "the cat sits on the mat.")),
)
SAME_IDS = (0, 10)  # two samples of the same text whose images have one size


def write_teacher(family: str, folder: Path) -> Path:
    text_fields, vision_fields, _ = tiny.CONFIGS[family]
    text = TEXT | TEXTS.get(family, {})
    if "rope_parameters" in text_fields:
        text["rope_parameters"] = text_fields["rope_parameters"] | {"mrope_section": [4, 6, 6]}
    vision = TOWERS.get(family, PATCHES if "depth" in vision_fields else TOWER)
    return tiny.write_checkpoint(family, folder, 1, text=text, vision=vision, **MORE.get(family, {}))


def write_data(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(11):
        width, height = SIZES[index % 4] if index != SAME_IDS[1] else SIZES[SAME_IDS[0]]
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        about = index if index != SAME_IDS[1] else SAME_IDS[0]
        image = "" if index in TEXT_ONLY else "<image>\n"
        question = image + "what is the color of this thing?" + " a red cat." * (about % 3)
        turns = [(question, "a blue dog sits on the mat." * (1 + about % 2))]
        turns += [("a cat?", "a red thing sits.")] * (index in TWO_TURNS)
        said = [
            {"from": who, "value": value} for turn in turns for who, value in zip(("human", "gpt"), turn, strict=True)
        ]
        rows.append({"id": str(index), "conversations": said} | ({"image": f"{index}.png"} if image else {}))
    for images, *turns in SEVERAL:
        said = [
            {"role": who, "content": text}
            for turn in turns
            for who, text in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append({"images": [f"{index}.png" for index in images], "messages": said})
    data = folder / "data.json"
    data.write_text(json.dumps(rows))
    return data


def template(family: str) -> str:
    return "chat" if tiny.chat_template(family) else "qa"


@dataclass
class Case:
    """A teacher, its samples, and what transformers says of each alone."""

    family: str
    worker: CaptureWorker

    def __post_init__(self) -> None:
        self.samples: list[EncodedSample] = [self.worker.encoder.encode(sample) for sample in self.worker.samples]
        backend = TransformersBackend(self.worker.checkpoint, "cpu", "float32")
        self.expected = [backend.capture([sample], self.worker.manifest)[0] for sample in self.samples]

    def open_vllm(self, **options):
        """An engine that cuts prompts; in this process if VLLM_ENABLE_V1_MULTIPROCESSING is 0."""
        from switchkd.pipelines.capture.backends.vllm_backend import VllmBackend

        settings = {
            "max_num_batched_tokens": CHUNKS.get(self.family, CHUNK),
            "max_num_seqs": 4,
            "block_size": BLOCK,
            "enforce_eager": True,
        }
        return VllmBackend(self.worker.checkpoint, "float32", MAX_LENGTH, options=settings | options)

    def image_of(self, sample: EncodedSample) -> range:
        """Positions from the first to the last image token."""
        at = np.flatnonzero(sample.input_ids == self.worker.checkpoint.image_token_id)
        return range(int(at[0]), int(at[-1]) + 1) if len(at) else range(0)

    def cuts_inside_images(self, pieces) -> int:
        """How many of the pieces that the pooler saw end inside an image; pieces of samples with equal answers are left out."""
        from switchkd.pipelines.capture.backends.vllm_backend import predicting_runs

        spans = {}
        for sample in self.samples:
            spans.setdefault(str(predicting_runs(sample.supervised)), []).append(self.image_of(sample))
        return sum(
            span.start < end < span.stop
            for _, end, runs in pieces
            for span in [spans.get(str(runs), [range(0)])[0]]
            if len(set(spans.get(str(runs), []))) == 1
        )


def open_case(family: str, folder: Path, data: Path, payload: str = "both") -> Case:
    options = CacheOptions(
        teacher=write_teacher(family, folder / family),
        data=data,
        images=data.parent / "images",
        out=folder / "unused.zarr",
        template=template(family),
        payload=payload,
        k=16,
        max_length=MAX_LENGTH,
        dtype="float32",
    )
    return Case(family, CaptureWorker(options))


def watch_pieces(patch) -> list:
    """Record what the pooler of an engine in this process sees: (first row, last row + 1, runs wanted)."""
    seen = []
    collect = vllm_pooler._collect

    def watched(held, runs, rows, begin):
        seen.append((begin, begin + len(rows), runs))
        collect(held, runs, rows, begin)

    patch.setattr(vllm_pooler, "_collect", watched)
    return seen
