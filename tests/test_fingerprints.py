"""Fingerprints: what changes a hash and, as much, what does not."""

import gc
import hashlib
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoImageProcessor, LlavaConfig, LlavaForConditionalGeneration

from switchkd.collector import without_collection
from switchkd.errors import CheckpointError
from switchkd.fingerprints import (
    INDEX_FILE,
    component_of,
    digest_sample,
    hash_config,
    hash_image_processor,
    hash_json,
    hash_tokenizer,
    hash_weights,
)
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_lm_head, load_model

COMPONENTS = ("vision", "projector", "language")


@pytest.fixture(scope="module")
def tensors(teacher):
    return load_file(teacher / "model.safetensors")


def save_by_component(folder, tensors, components=COMPONENTS):
    """Write an index and one file per component, as a checkpoint whose vision shard can be left out."""
    folder.mkdir(exist_ok=True)
    index = {name: f"{component_of(name)}.safetensors" for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    for component in components:
        part = {name: tensor for name, tensor in tensors.items() if component_of(name) == component}
        save_file(part, folder / f"{component}.safetensors")
    return folder


def test_hash_weights_does_not_depend_on_sharding(teacher, tmp_path):
    LlavaForConditionalGeneration.from_pretrained(teacher).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole = hash_weights(teacher)
    assert hash_weights(tmp_path) == whole
    assert tuple(whole) == COMPONENTS
    assert len(set(whole.values())) == 3


def test_hash_weights_does_not_depend_on_file_names_or_metadata(teacher, tensors, tmp_path):
    save_by_component(tmp_path, tensors)
    assert hash_weights(tmp_path) == hash_weights(teacher)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"note": "another"})
    for name in COMPONENTS:
        (tmp_path / f"{name}.safetensors").unlink()
    assert hash_weights(tmp_path) == hash_weights(teacher)


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_changed_weight_changes_its_component_alone(teacher, tensors, tmp_path, component):
    name = next(name for name in tensors if component_of(name) == component)
    changed = tensors[name].clone()
    changed.view(-1)[-1] += 1e-3
    save_file(tensors | {name: changed}, tmp_path / "model.safetensors")
    before, after = hash_weights(teacher), hash_weights(tmp_path)
    assert [c for c in COMPONENTS if before[c] != after[c]] == [component]


@pytest.mark.parametrize(
    "change",
    [
        lambda name, tensor: {name: tensor.bfloat16()},
        lambda name, tensor: {name: tensor.reshape(-1)},
        lambda name, tensor: {name + "s": tensor},
        lambda name, tensor: {},
    ],
    ids=["dtype", "shape", "name", "absent"],
)
def test_dtype_shape_and_name_of_a_weight_count(tmp_path, change):
    weights = {"multi_modal_projector.a": torch.zeros(2, 3), "multi_modal_projector.b": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors")
    before = hash_weights(tmp_path)
    kept = weights.pop("multi_modal_projector.a")
    save_file(weights | change("multi_modal_projector.a", kept), tmp_path / "model.safetensors")
    assert hash_weights(tmp_path)["projector"] != before["projector"]


def test_exchanging_the_values_of_two_weights_counts(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    before = hash_weights(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert hash_weights(tmp_path)["language"] != before["language"]


def test_vision_need_not_be_there_unless_asked_for(teacher, tensors, tmp_path):
    save_by_component(tmp_path, tensors, ("projector", "language"))
    whole = hash_weights(teacher)
    found = hash_weights(tmp_path, ("projector", "language"))
    assert found == {component: whole[component] for component in ("projector", "language")}
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of the 3 files that model\.safetensors\.index\.json names, .* vision"
    ):
        hash_weights(tmp_path)


def cut(path, byte_count):
    path.write_bytes(path.read_bytes()[:-byte_count])
    return path


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"language_model.norm.weight": torch.ones(8)}, path)
    cut(path, 4)
    with pytest.raises(CheckpointError) as caught:
        hash_weights(tmp_path)
    assert str(caught.value) == f"{path} is cut short inside tensor language_model.norm.weight; copy it again"


def test_a_truncated_vision_file_does_no_harm_unless_asked_for(tensors, tmp_path):
    save_by_component(tmp_path, tensors)
    cut(tmp_path / "vision.safetensors", 4)
    hash_weights(tmp_path, ("projector", "language"))
    with pytest.raises(CheckpointError, match=r"vision\.safetensors is cut short inside tensor .*vision_tower"):
        hash_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\0\0",
        b"\xff" * 40,
        b"version https://git-lfs.github.com/spec/v1\n",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{",
    ],
    ids=["empty", "short", "huge header", "git-lfs pointer", "not an object", "cut header"],
)
def test_a_file_that_is_not_safetensors_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        hash_weights(tmp_path)
    assert str(caught.value).startswith(f"{path} is not a safetensors file: ")


def test_no_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        hash_weights(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no model.safetensors and no model.safetensors.index.json: other weight formats, or names, are not read"
    )


@pytest.mark.parametrize("sharded", (False, True))
@pytest.mark.parametrize(
    "other", ("consolidated.safetensors", "adapter_model.safetensors", "a.safetensors", "model-fp16.safetensors")
)
def test_other_weights_in_the_folder_are_not_the_models(teacher, tensors, tmp_path, sharded, other):
    """Identity, LM head and model are read from the same files, whatever lies beside them."""
    folder = shutil.copytree(teacher, tmp_path / "ckpt")
    if sharded:
        (folder / "model.safetensors").unlink()
        LlavaForConditionalGeneration.from_pretrained(teacher).save_pretrained(folder, max_shard_size="20KB")
        assert (folder / INDEX_FILE).is_file()
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / other)
    assert hash_weights(folder) == hash_weights(teacher)
    opened = open_checkpoint(folder)
    head = load_lm_head(opened, "float32")
    assert torch.equal(head, load_lm_head(open_checkpoint(teacher), "float32"))
    assert torch.equal(head, load_model(opened).lm_head.weight)


def test_a_single_file_comes_before_an_index_as_in_transformers(teacher, tensors, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "ckpt")
    save_by_component(folder, {name: tensor * 2 for name, tensor in tensors.items()})
    assert hash_weights(folder) == hash_weights(teacher)
    assert torch.equal(
        load_model(open_checkpoint(folder)).lm_head.weight, load_model(open_checkpoint(teacher)).lm_head.weight
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "does not say where weights are"),
        ("[]", "does not say where weights are"),
        ('{"weight_map": []}', "does not say where weights are"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {"a": 3}}', "does not say where weights are"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names \.\./x\.safetensors: not a checkpoint's"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', r"names pytorch_model\.bin: not a checkpoint's"),
        ("[" * 100_000, "does not say where weights are"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        hash_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("vision_tower.encoder.layers.0.weight", "vision"),
        ("model.vision_tower.encoder.layers.0.weight", "vision"),
        ("multi_modal_projector.linear_1.bias", "projector"),
        ("language_model.model.embed_tokens.weight", "language"),
        ("lm_head.weight", "language"),
    ],
)
def test_component_of(name, component):
    assert component_of(name) == component


def test_hash_tokenizer_ignores_padding_and_truncation_state():
    tokenizer = tiny.tokenizer()
    before = hash_tokenizer(tokenizer)
    tokenizer(["red", "a red circle"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer.backend_tokenizer.truncation is not None
    assert hash_tokenizer(tokenizer) == before


def test_what_is_known_of_a_tokenizer_is_known_of_its_content():
    """The hash of a tokenizer that was changed is not the one that was computed before; equal ones share theirs."""

    def naive(tokenizer):
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        backend = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
        return hash_json([backend, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])

    tokenizer, equal = tiny.tokenizer(), tiny.tokenizer()
    found = [hash_tokenizer(tokenizer)]
    assert found == [hash_tokenizer(equal)] == [naive(tokenizer)]
    tokenizer.add_tokens(["green"])
    found.append(hash_tokenizer(tokenizer))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    found.append(hash_tokenizer(tokenizer))
    tokenizer.pad_token = "<unk>"
    found.append(hash_tokenizer(tokenizer))
    assert len(set(found)) == 4
    assert found[-1] == naive(tokenizer)
    assert hash_tokenizer(equal) == found[0]


def test_the_collector_is_on_again_whatever_happens():
    def fail():
        with without_collection():
            assert not gc.isenabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()
    gc.disable()
    with without_collection():
        pass
    assert not gc.isenabled()
    gc.enable()


def test_hash_tokenizer_survives_saving(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert hash_tokenizer(type(tokenizer).from_pretrained(tmp_path)) == hash_tokenizer(tokenizer)


def test_hash_tokenizer_sees_added_special_and_exchanged_words():
    hashes = {hash_tokenizer(tiny.tokenizer())}
    for change in (lambda t: t.add_tokens(["green"]), lambda t: setattr(t, "eos_token", "<pad>")):
        tokenizer = tiny.tokenizer()
        change(tokenizer)
        hashes.add(hash_tokenizer(tokenizer))
    hashes.add(hash_tokenizer(tiny.tokenizer([*tiny.WORDS[:-2], *tiny.WORDS[:-3:-1]])))
    assert len(hashes) == 4


def config_of(folder):
    return LlavaConfig.from_pretrained(folder).to_dict()


def test_hash_config_ignores_dtype_and_origin(teacher):
    config = config_of(teacher)
    before = hash_config(config)
    for part in (config, config["text_config"], config["vision_config"]):
        part |= {"_name_or_path": "/elsewhere", "dtype": "bfloat16", "torch_dtype": "float16", "use_cache": False}
    assert hash_config(config | {"transformers_version": "9.9"}) == before


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_hash_config_sees_what_is_computed(teacher, part):
    config = config_of(teacher)
    before = hash_config(config)
    (config[part] if part else config)["rms_norm_eps"] = 0.5
    assert hash_config(config) != before


def test_hash_config_does_not_change_the_config(teacher):
    config = config_of(teacher)
    before = json.dumps(config, sort_keys=True, default=str)
    hash_config(config)
    assert json.dumps(config, sort_keys=True, default=str) == before


def test_hash_config_of_another_checkpoint_differs(teacher, student):
    assert hash_config(config_of(teacher)) != hash_config(config_of(student))


def test_hash_image_processor_sees_settings_and_class(teacher):
    def load(**options):
        return AutoImageProcessor.from_pretrained(teacher, backend="pil", **options)

    assert hash_image_processor(load()) == hash_image_processor(load())
    other_backend = type("CLIPImageProcessor", (type(load()),), {})(**load().to_dict())
    assert other_backend.to_dict() == load().to_dict()  # the settings do not tell backends apart, the class does
    others = [load(image_mean=[0.4] * 3), load(resample=0), other_backend]
    assert len({hash_image_processor(processor) for processor in [load(), *others]}) == 4


def test_hash_json_ignores_key_order_alone():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json({"a": [1, 2]}) != hash_json({"a": [2, 1]})
    assert len(hash_json({})) == 16


IDS, MASK = np.array([5, 6, 7], np.int32), np.array([0, 1, 1], np.bool_)


def test_digest_of_a_sample_is_64_bits_a_field_and_0_without_an_image():
    digest = digest_sample(IDS, MASK, None)
    assert digest.image == 0
    assert all(0 < field < 2**64 for field in digest[:2])
    assert digest_sample(IDS, MASK, b"").image != 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": np.array([5, 6, 8], np.int32)}, ["text"]),
        ({"supervised": np.array([1, 1, 1], np.bool_)}, ["supervised mask"]),
        ({"supervised": np.array([0, 1, 1, 0], np.bool_)}, ["supervised mask"]),  # the same bits, packed
        ({"image": b"y"}, ["image"]),
        ({"image": None}, ["image"]),
        ({"input_ids": IDS.astype(np.int64)}, []),
        ({"input_ids": IDS[::-1][::-1]}, []),
    ],
)
def test_a_digest_names_what_differs(change, words):
    arguments = {"input_ids": IDS, "supervised": MASK, "image": b"x"}
    one, other = digest_sample(**arguments), digest_sample(**arguments | change)
    assert one.differing(other) == other.differing(one) == words


def test_digests_stay_what_stores_hold():
    """BLAKE2b, 8 bytes, little endian: a store written today is read by later versions."""
    packed = {
        "input_ids": b"\5\0\0\0\6\0\0\0\7\0\0\0",  # little-endian int32
        "supervised": b"\x60" + b"\3\0\0\0\0\0\0\0",  # 011 from the top bit down, then the length
        "image": b"x",
    }
    for field, data in packed.items():
        expected = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        assert getattr(digest_sample(IDS, MASK, b"x"), field) == expected


def test_hash_config_is_the_same_for_a_key_that_transformers_renamed():
    assert hash_config({"a": {"_pad_token_id": 2}}) == hash_config({"a": {"pad_token_id": 2}})
    assert hash_config({"a": {"_pad_token_id": 2}}) != hash_config({"a": {"pad_token_id": 3}})
