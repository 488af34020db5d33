"""Row 18: whatever is wrong with a checkpoint's files is told in an error that names the folder, before it is used."""

import json
import struct

import broken_checkpoints as broken
import pytest
import tiny

from switchkd.errors import CheckpointError, InputError
from switchkd.fingerprints import hash_weights
from switchkd.models.checkpoint import open_checkpoint, teacher_identity
from switchkd.models.vlm import load_lm_head, load_model


@pytest.fixture
def folder(teacher, tmp_path):
    """A copy of the tiny teacher, to be broken."""
    return broken.copy(teacher, tmp_path / "ckpt")


def use(folder):
    """Everything that is done with a checkpoint's files."""
    opened = open_checkpoint(folder)
    teacher_identity(opened)
    load_model(opened)
    load_lm_head(opened, "float32")


def outcome(folder):
    """The message of our error, or None."""
    try:
        use(folder)
    except InputError as error:
        return str(error)
    return None


def refused(folder, match):
    with broken.bounded(), pytest.raises(CheckpointError, match=match) as caught:
        use(folder)
    assert str(folder) in str(caught.value) and caught.value.exit_code == 2


CONFIGS = {
    "a list": ([], "should hold an object, found list"),
    "a number": (7, "should hold an object, found int"),
    "null": (None, "should hold an object, found NoneType"),
    "empty": ({}, "is a None model; expected one of llava, "),
    "of another kind": ({"model_type": "bert"}, "is a 'bert' model"),
    "of no kind": ({"model_type": ["llava"]}, r"is a \['llava'\] model"),
    "without parts": ({"model_type": "llava"}, "should describe its vision_config in an object, found nothing"),
    "parts are text": ({"model_type": "llava", "vision_config": "x"}, "should describe its vision_config .*found str"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_row_18_a_config_of_another_kind(folder, kind):
    content, match = CONFIGS[kind]
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, match)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\0", '{"a": 1' + "0" * 10_000 + "}"])
def test_row_18_a_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "cannot open checkpoint|model; expected")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"vision_feature_layer": -30}, r"feature layer -30 does not exist: the tower has 2 layers, so that it is one of -3 … 2"),
        ({"vision_feature_layer": 3}, "feature layer 3 does not exist"),
        ({"vision_feature_layer": [-1, 9]}, "feature layer 9 does not exist"),
        ({"vision_feature_layer": "last"}, "vision_feature_layer should be the number of a layer"),
        ({"vision_feature_layer": []}, "vision_feature_layer should be"),
        ({"vision_feature_layer": True}, "vision_feature_layer should be"),
        ({"vision_feature_select_strategy": "all"}, "should be default or full, found 'all'"),
        ({"image_token_index": -1, "image_token_id": ...}, "image_token_index should be the id of a token, found -1"),
        ({"image_token_index": "<image>"}, "should be the id of a token, found '<image>'"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers should be between 1 and 1,024, found 1000000000"),
        ({"text_config__num_hidden_layers": 10**4000}, "num_hidden_layers should be between"),
        ({"vision_config__num_hidden_layers": -1}, "num_hidden_layers should be between"),
        ({"vision_config__image_size": 0}, "image_size should be between 1"),
        ({"vision_config__image_size": 1 << 14}, "an image would become 4,194,304 tokens"),
        ({"vision_config__num_channels": 4}, "num_channels should be between 1 and 3"),
        ({"text_config__vocab_size": 1 << 23}, "describes a model of at least .* weights, its safetensors files hold"),
        ({"text_config__intermediate_size": 1 << 23}, "describes a model of at least"),
        ({"text_config__hidden_size": "32"}, "cannot open checkpoint"),
        ({"text_config__model_type": "no_such"}, "cannot open checkpoint"),
        ({"text_config__hidden_size": 48}, "cannot open checkpoint"),
    ],
)  # fmt: skip
def test_row_18_a_config_with_a_wrong_value(folder, changed, match):
    refused(broken.edit(folder, "config.json", **changed), match)


@pytest.mark.parametrize(
    ("token", "match"),
    [
        (tiny.WORDS.index("red"), "image token id 10 is 'red', an ordinary word"),
        (tiny.WORDS.index("?"), "an ordinary word"),
        (tiny.WORDS.index("<eos>"), "'<eos>', is the tokenizer's eos token"),
        (tiny.WORDS.index("<pad>"), "pad token"),
        (tiny.WORDS.index("<unk>"), "unk token"),
        (99, "image token id 99 is not in the tokenizer, whose largest id is 14"),
    ],
)
def test_row_18_an_image_token_that_texts_contain(folder, token, match):
    """All rows were skipped, with exit code 0."""
    refused(broken.edit(folder, "config.json", image_token_index=token, image_token_id=...), match)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, -200, -1])
def test_row_18_weights_cut_short(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, "safetensors")


@pytest.mark.parametrize("place", range(0, 400, 23))
@pytest.mark.parametrize("bit", (1, 6))
def test_row_18_a_flipped_bit_in_the_header_of_weights(folder, place, bit):
    """Some flips leave a header that says the same, such as that of a metadata key; none ends otherwise than in our error."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(bytes(data))
    with broken.bounded():
        said = outcome(folder)
    assert said is None or str(folder) in said


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"7",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999999999]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "xy"}}',
        b"{" * 5000,
    ],
)
def test_row_18_a_header_of_another_kind(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        hash_weights(folder)


def test_row_18_missing_and_cut_shards(folder):
    model = load_model(open_checkpoint(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    use(folder)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:200])
    refused(folder, shards[1].name)
    shards[1].unlink()
    refused(folder, f"lacks 1 of the {len(shards)} files")
    shards[1].write_bytes(whole)
    for index in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        refused(folder, "index.json")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("kept", [0, 1, 50, -20, None])
def test_row_18_a_tokenizer_or_processor_that_is_cut_or_missing(folder, file, kept):
    path = folder / file
    path.unlink() if kept is None else path.write_bytes(path.read_bytes()[:kept])
    with broken.bounded():
        said = outcome(folder)
    if (file, kept) == ("tokenizer_config.json", None):  # tokenizer.json says as much
        assert said is None
    else:
        assert str(folder) in said


@pytest.mark.parametrize("name", ["", "config.json/x", "none"])
def test_row_18_a_folder_without_a_checkpoint(folder, tmp_path, name):
    (tmp_path / "empty").mkdir()
    for place in (folder / name if name else tmp_path / "empty",):
        with pytest.raises(CheckpointError, match="no checkpoint at .*expected a folder with a config.json"):
            open_checkpoint(place)
