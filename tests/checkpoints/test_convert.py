"""Checkpoints in other projects' layouts: the same logits before and after, and every tensor accounted for.

`logits_of` is the other projects' forward pass, written from how they work: an image's projected features are spliced in where
the text holds the id -200.
"""

import json
import shutil
from pathlib import Path

import pytest
import reference
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from switchkd.cli.main import main
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.checkpoints.convert import convert
from switchkd.pipelines.checkpoints.options import ConvertOptions

NO_IMAGE = [word for word in tiny.WORDS if word != "<image>"]
TEXT = [4, 5, -200, 6, 7, 3]  # ids as those projects write them
NAMES = {
    "tinyllava": ("language_model.", "vision_tower._vision_tower.vision_model.", "connector._connector."),
    "llava": ("", "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."),
}
LDPV2 = {"linear_1": "mlp.mlp.0", "linear_2": "mlp.mlp.2", "position": "peg.peg.0"}


def write(
    folder: Path, layout, *, tower="siglip", language="qwen2", tied=True, projector="mlp2x_gelu", rows=16, size=16
):
    """Save a tiny checkpoint as the project of this layout would."""
    torch.manual_seed(3)
    folder.mkdir(parents=True)
    text = tiny.text_config(language, width=16, rows=rows, tied=tied)
    vision = tiny.vision_config(tower, width=24, size=size)
    if tower == "siglip":
        vision.vision_use_head = True
    state = {}
    prefixes = NAMES[layout]
    for prefix, part in (
        (prefixes[0], AutoModelForCausalLM.from_config(text)),
        (prefixes[1], AutoModel.from_config(vision)),
    ):
        state |= {prefix + name: tensor * 2 for name, tensor in part.state_dict().items()}
    if tied:
        del state[f"{prefixes[0]}lm_head.weight"]
    if projector == "mlp2x_gelu":
        shapes = {"0.weight": (16, 24), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    else:
        shapes = {f"{LDPV2['linear_1']}.weight": (16, 24), f"{LDPV2['linear_2']}.weight": (16, 16)}
        shapes |= {f"{LDPV2['position']}.weight": (16, 1, 3, 3)} | {f"{name}.bias": (16,) for name in LDPV2.values()}
    state |= {prefixes[2] + name: torch.randn(shape) for name, shape in shapes.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    if layout == "tinyllava":
        config = {
            "model_type": "tinyllava",
            "connector_type": projector,
            "text_config": text.to_dict(),
            "vision_config": vision.to_dict(),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "patch",
            "image_aspect_ratio": "square",
        }
    else:
        config = text.to_dict() | {
            "model_type": "llava",
            "architectures": [{"qwen2": "LlavaQwenForCausalLM", "llama": "LlavaLlamaForCausalLM"}[language]],
            "mm_projector_type": projector,
            "mm_vision_tower": "openai/clip",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": 24,
            "image_aspect_ratio": "pad",
            "tokenizer_model_max_length": 2048,
        }
    (folder / "config.json").write_text(json.dumps(config))
    tiny.tokenizer(NO_IMAGE).save_pretrained(folder)
    eyes = folder / "vision_tower"
    tower_state = {n.removeprefix(prefixes[1]): t for n, t in state.items() if n.startswith(prefixes[1])}
    tower_model = AutoModel.from_config(vision)
    tower_model.load_state_dict(tower_state)
    tower_model.save_pretrained(eyes)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(eyes)
    return folder


def part(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@torch.no_grad()
def logits_of(folder, layout, pixels):
    """Logits of TEXT with one image, [length, V], by the other project's own forward pass."""
    config = json.loads((folder / "config.json").read_text())
    state = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    prefixes = NAMES[layout]
    if layout == "tinyllava":
        text, vision = config["text_config"], config["vision_config"]
        layer, select = config["vision_feature_layer"], config["vision_feature_select_strategy"]
    else:
        kind = "qwen2" if "Qwen" in config["architectures"][0] else "llama"
        text = config | {"model_type": kind}
        vision = json.loads((folder / "vision_tower/config.json").read_text())
        layer, select = config["mm_vision_select_layer"], config["mm_vision_select_feature"]
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)).eval()
    words = part(state, prefixes[0]) if prefixes[0] else state
    words = {n: t for n, t in words.items() if n.startswith(("model.", "lm_head.")) and "mm_proj" not in n}
    words = {n: t for n, t in words.items() if "vision_tower" not in n}
    assert set(language.load_state_dict(words, strict=False).missing_keys) <= {"lm_head.weight"}
    language.tie_weights()
    tower = AutoModel.from_config(AutoConfig.for_model(**vision)).eval()
    tower.load_state_dict(part(state, prefixes[1]))
    features = tower(pixels, output_hidden_states=True).hidden_states[layer]
    features = features[:, 1:] if select == "patch" else features
    p = part(state, prefixes[2])
    if "0.weight" in p:
        inner = F.gelu(F.linear(features, p["0.weight"], p["0.bias"]))
        image = F.linear(inner, p["2.weight"], p["2.bias"])[0]
    else:
        weights = {f"{ours}.{w}": p[f"{theirs}.{w}"] for ours, theirs in LDPV2.items() for w in ("weight", "bias")}
        image = reference.ldpv2(features[0], weights, 12).float()
    embeds = [image if id_ == -200 else language.get_input_embeddings()(torch.tensor([id_])) for id_ in TEXT]
    return language(inputs_embeds=torch.cat(embeds)[None]).logits[0]


@torch.no_grad()
def our_logits(folder, pixels):
    """The same text and image with transformers' Llava."""
    opened = open_checkpoint(folder)
    token = [opened.image_token_id] * opened.image_tokens
    ids = [i for word in TEXT for i in (token if word == -200 else [word])]
    return load_model(opened)(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]


def run(*words):
    return CliRunner().invoke(main, ["convert", *map(str, words)])


CASES = {
    "tinyllava: siglip, tied, the first patch dropped": ("tinyllava", {}),
    "tinyllava: clip, untied": ("tinyllava", {"tower": "clip", "tied": False}),
    "llava: clip and llama, untied": ("llava", {"tower": "clip", "language": "llama", "tied": False}),
    "llava: clip and qwen2, no free row": ("llava", {"tower": "clip", "rows": len(NO_IMAGE)}),
    "mobilevlm: ldpv2": ("llava", {"tower": "clip", "projector": "ldpnetv2", "language": "llama", "size": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_same_there_and_back(case, tmp_path):
    layout, build = CASES[case]
    source = write(tmp_path / "theirs", layout, **build)
    size = build.get("size", 16)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    extra = ("--vision", source / "vision_tower") if layout == "tinyllava" else ()
    done = run(source, tmp_path / "ours", *extra)
    assert done.exit_code == 0, done.output
    expected = logits_of(source, layout, pixels)
    found = our_logits(tmp_path / "ours", pixels)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05
    count = len(load_file(source / "model.safetensors"))
    assert f"{count} tensors" in done.output
    back = run(tmp_path / "ours", tmp_path / "back", "--to", layout)
    assert back.exit_code == 0, back.output
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name  # the embedding may have got rows for <image>
    shutil.rmtree(source)  # nothing points back
    torch.testing.assert_close(logits_of(tmp_path / "back", layout, pixels), found, rtol=1e-4, atol=1e-4)


def test_the_first_patch_is_dropped_or_kept(tmp_path):
    source = write(tmp_path / "theirs", "tinyllava")
    for strategy, tokens in ((None, 3), ("default", 3), ("full", 4)):
        target = tmp_path / str(strategy)
        convert(ConvertOptions(source, target, strategy=strategy))
        assert open_checkpoint(target).image_tokens == tokens


def test_between_the_two_by_way_of_hf(tmp_path):
    source = write(tmp_path / "theirs", "llava", tower="clip", language="llama", tied=False)
    pixels = torch.randn(1, 3, 16, 16)
    convert(ConvertOptions(source, tmp_path / "tiny", to="tinyllava"))
    torch.testing.assert_close(
        logits_of(tmp_path / "tiny", "tinyllava", pixels)[:, :16],
        logits_of(source, "llava", pixels),
        rtol=1e-4,
        atol=1e-4,
    )
    assert json.loads((tmp_path / "tiny/config.json").read_text())["image_aspect_ratio"] == "pad"


def test_images_are_padded_as_the_config_says(tmp_path):
    """And the processor that goes back does not pad, since those projects do it themselves."""
    source = write(tmp_path / "theirs", "llava", tower="clip", language="llama")
    convert(ConvertOptions(source, tmp_path / "ours"))
    assert open_checkpoint(tmp_path / "ours").image_processor.do_pad
    convert(ConvertOptions(tmp_path / "ours", tmp_path / "back", to="llava"))
    kept = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert kept["image_processor_type"] == "CLIPImageProcessor"


def test_a_tower_that_the_checkpoint_does_not_hold_comes_from_its_folder(tmp_path):
    source = write(tmp_path / "theirs", "llava", tower="clip", language="llama")
    pixels = torch.randn(1, 3, 16, 16)
    expected = logits_of(source, "llava", pixels)
    weights = load_file(source / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "vision" not in n}, source / "model.safetensors")
    done = convert(ConvertOptions(source, tmp_path / "ours"))
    assert done.from_tower == sum("vision" in name for name in weights)
    torch.testing.assert_close(our_logits(tmp_path / "ours", pixels), expected, rtol=1e-4, atol=1e-4)


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


NORM = "language_model.model.norm.weight"
MISTAKES = {
    "missing": (lambda f: change(f, lambda w: w.pop(NORM)), f"lacks 1 tensor ({NORM})"),
    "unknown": (
        lambda f: change(f, lambda w: w.update({"ema.x": torch.zeros(1)})),
        "holds 1 tensor (ema.x) that layout tinyllava does not have",
    ),
    "without a place": (
        lambda f: change(f, lambda w: w.update({"language_model.model.layers.9.x": torch.zeros(1)})),
        "holds 1 tensor (language_model.model.layers.9.x) that its config has no place for",
    ),
    "misshapen": (lambda f: change(f, lambda w: w.update({NORM: torch.zeros(3)})), "is (3,), its config says (16,)"),
    "two heads": (
        lambda f: change(f, lambda w: w.update({"language_model.lm_head.weight": torch.zeros(16, 16)})),
        "ties its LM head to the embedding, and holds two that differ",
    ),
    "another projector": (lambda f: config(f, connector_type="qformer"), "projector 'qformer': mlp2x_gelu"),
    "tiles": (lambda f: config(f, image_aspect_ratio="anyres"), "cuts images into tiles"),
    "another model": (lambda f: config(f, model_type="bert"), "a 'bert' model is in none of the layouts"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no .safetensors weights"),
    "no processor": (lambda f: shutil.rmtree(f / "vision_tower"), "has no image processor"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(mistake, tmp_path):
    spoil, message = MISTAKES[mistake]
    source = write(tmp_path / "theirs", "tinyllava")
    spoil(source)
    done = run(source, tmp_path / "ours")
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "ours").exists()


def test_pickles_are_read_as_tensors_only(tmp_path):
    source = write(tmp_path / "theirs", "tinyllava")
    weights = load_file(source / "model.safetensors")
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old versions saved
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    done = convert(ConvertOptions(source, tmp_path / "ours"))
    assert done.dropped == ["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert done.tensors == len(weights) - 1
    torch.save({"x": Path("evil")}, source / "pytorch_model.bin")
    refused = run(source, tmp_path / "again")
    assert refused.exit_code == 2 and "holds more than tensors" in refused.output


def in_folders(source, folder):
    """Save the checkpoint as TinyLLaVA Factory does after pre-training: a pickle for each part, and the buffers left out."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(source / "model.safetensors")
    prefixes = {
        "language_model": "language_model.",
        "vision_tower": "vision_tower._vision_tower.",
        "connector": "connector.",
    }
    for name, prefix in prefixes.items():
        (folder / name).mkdir(exist_ok=True)
        named = {key: tensor for key, tensor in part(state, prefix).items() if not key.endswith("position_ids")}
        torch.save(named, folder / name / "pytorch_model.bin")
    return folder


def test_folders_of_tinyllava_factory_are_read(tmp_path):
    """Row 28 of the faults found by outside trials."""
    source = write(tmp_path / "theirs", "tinyllava")
    folders = in_folders(source, tmp_path / "folders")
    whole = convert(ConvertOptions(source, tmp_path / "whole"))
    assert convert(ConvertOptions(folders, tmp_path / "ours")).tensors == whole.tensors
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "ours"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    (folders / "connector/pytorch_model.bin").unlink()
    refused = run(folders, tmp_path / "again")
    assert refused.exit_code == 2
    assert "it lacks connector/pytorch_model.bin" in refused.output
    torch.save({"x": Path("evil")}, folders / "connector/pytorch_model.bin")
    assert "holds more than tensors" in run(folders, tmp_path / "again").output


def test_the_config_counts_the_tokens_of_an_image(tmp_path):
    """Row 25 of the faults found by outside trials: 576, transformers' default, stood in every converted config."""
    convert(ConvertOptions(write(tmp_path / "theirs", "tinyllava"), tmp_path / "ours"))
    opened = open_checkpoint(tmp_path / "ours")
    assert opened.config.image_seq_length == opened.image_tokens == 3  # 2 × 2 patches, the first one dropped


def test_what_is_there_is_not_overwritten(tmp_path, teacher):
    assert "is in layout hf already" in run(teacher, tmp_path / "x").output
    assert "is not empty" in run(teacher, teacher, "--to", "llava").output
    done = run(tmp_path / "nowhere", tmp_path / "x")
    assert done.exit_code == 2 and "no checkpoint at" in done.output


def test_opening_another_layout_points_to_convert(tmp_path):
    source = write(tmp_path / "theirs", "llava", tower="clip", language="llama")
    data = tiny.data(tmp_path / "data", tiny.rows(1))
    done = CliRunner().invoke(
        main, ["eval", "--model", str(source), "--data", str(data), "--output", str(tmp_path / "o")]
    )
    assert done.exit_code == 2 and "`switchkd convert` makes one" in done.output
