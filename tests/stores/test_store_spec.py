"""The specification is enough: manifest hashes and sample digests, made from stores/README.md alone, are those in a store.

Nothing here imports switchkd but to write the store that is judged; tokenizers, safetensors, json and hashlib do the work.
"""

import hashlib
import json

import numpy as np
import pytest
import tiny
import zarr
from safetensors import safe_open
from tokenizers import Tokenizer

from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions

PROVENANCE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "processor_class",
    "auto_map",
    "use_cache",
}


@pytest.fixture(scope="module", params=["qa", "qwen2_base"])
def place(request, tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("spec")
    data = tiny.data(folder, tiny.rows(5, text_only=(1,), two_turns=(2, 3)))
    options = {"teacher": teacher, "data": data, "images": folder / "images", "out": folder / "t.zarr"}
    cache_teacher(CacheOptions(template=request.param, part_size=2, k=3, **options))
    return folder


@pytest.fixture
def manifest(place):
    return json.loads((place / "t.zarr/zarr.json").read_text())["attributes"]["switchkd"]


def hash_of(data):
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()


def stripped(value):
    if isinstance(value, dict):
        return {key: stripped(item) for key, item in value.items() if key not in PROVENANCE}
    return value


def test_checksum_and_identity(manifest, place):
    assert manifest["checksum"] == hash_of({key: value for key, value in manifest.items() if key != "checksum"})
    outside = {"format", "version", "written_by", "checksum"}
    identity = hash_of({key: value for key, value in manifest.items() if key not in outside})
    part = json.loads((place / "t.zarr/parts/00001/zarr.json").read_text())["attributes"]["switchkd_part"]
    assert part["store"] == identity


def test_the_data_files_hash(manifest, place):
    assert manifest["data"] == hashlib.sha256((place / "data.json").read_bytes()).hexdigest()


def test_the_tokenizers_hash(manifest, teacher):
    content = json.loads((teacher / "tokenizer.json").read_text())
    content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    special = {name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
    assert manifest["tokenizer"] == hash_of([content, special])


def test_the_weights_hashes(manifest, teacher):
    parts = {"vision": [], "projector": [], "language": []}
    with (teacher / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, body = json.loads(file.read(size)), file.read()
    with safe_open(teacher / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dict
            component = "vision" if "vision_tower" in name else "projector"
            component = component if "vision_tower" in name or "multi_modal_projector" in name else "language"
            begin, end = header[name]["data_offsets"]
            digest = hashlib.blake2b(body[begin:end], digest_size=8).hexdigest()
            parts[component].append([name, f"{header[name]['dtype']} {header[name]['shape']} {digest}"])
    for component, found in parts.items():
        assert manifest["teacher"][component] == hash_of(sorted(found)), component


def test_the_configs_hashes(manifest, teacher):
    from transformers import AutoImageProcessor, LlavaConfig

    assert manifest["teacher"]["config"] == hash_of(stripped(LlavaConfig.from_pretrained(teacher).to_dict()))
    processor = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    settings = {key: value for key, value in processor.to_dict().items() if value is not None}
    assert manifest["image_processor"] == hash_of([type(processor).__name__, stripped(settings)])


def segments_of(template, turns, has_image, eos):
    def fill(pattern, text="", image=""):
        return pattern.replace("{eos}", eos).replace("{image}", image).replace("{text}", text)

    yield fill(template["system"]), False
    for number, (question, answer) in enumerate(turns):
        image = template["image"] if has_image and number == 0 else ""
        yield fill(template["user"] + template["assistant"], question, image), False
        yield fill(template["answer"], answer), True
        yield fill(template["after"]), False


def ids_and_mask(manifest, row, tokenizer, image_id, eos):
    texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    joined = []
    for text, supervised in segments_of(manifest["template"], turns, "image" in row, eos):
        if text and joined and joined[-1][1] == supervised:
            joined[-1] = (joined[-1][0] + text, supervised)
        elif text:
            joined.append((text, supervised))
    ids, mask = [], []
    for text, supervised in joined:
        for number, piece in enumerate([text] if supervised else text.split("<image>")):
            new = [image_id] * manifest["image_tokens"] if number else []
            new += tokenizer.encode(piece, add_special_tokens=False).ids
            ids += new
            mask += [supervised] * len(new)
    return ids, mask


def test_the_digests_of_every_sample(manifest, place, teacher):
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    eos = json.loads((teacher / "tokenizer_config.json").read_text())["eos_token"]
    root = zarr.open_group(place / "t.zarr", mode="r")
    for index, row in enumerate(json.loads((place / "data.json").read_text())):
        ids, mask = ids_and_mask(manifest, row, tokenizer, tokenizer.token_to_id("<image>"), eos)
        bits = np.packbits(np.array(mask)).tobytes() + len(mask).to_bytes(8, "little")
        image = (place / "images" / row["image"]).read_bytes() if "image" in row else None
        contents = [np.array(ids, "<i4").tobytes(), bits, image]
        expected = [
            0 if content is None else int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            for content in contents
        ]
        part, place_in_part = divmod(index, manifest["part_size"])
        group = root[f"parts/{part:05d}"]
        assert group["samples/digest"][place_in_part].tolist() == expected, index
        begin, end = group["samples/offset"][place_in_part : place_in_part + 2]
        assert end - begin == sum(mask[1:])  # positions are the supervised tokens but a first one
