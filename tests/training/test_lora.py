"""LoRA through peft: equal to a loop written by hand, exact on resume, merged when it is saved, refused where it cannot train."""

import importlib.util
import shutil
from dataclasses import replace
from itertools import islice

import families
import pytest
import torch
import torch.nn.functional as F
import training
from family_batches import own_inputs
from safetensors.torch import load_file
from training import (
    Stop,
    assert_equal_runs,
    assert_same_weights,
    flags_of,
    history,
    interrupt_after,
    two_processes,
    weights,
)
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.errors import ConfigError
from switchkd.fingerprints import component_of
from switchkd.models.components import language_model_of
from switchkd.models.lora import attach_lora, chosen_layers, is_lora, linear_layers, merged_weights
from switchkd.pipelines.training.batches.collator import Collator
from switchkd.pipelines.training.inputs import open_inputs, resolve_options
from switchkd.pipelines.training.lifecycle import checkpointing
from switchkd.pipelines.training.train import train
from switchkd.settings import Lora

peft = pytest.importorskip("peft", reason="--lora needs peft: extra `lora`")
cached, hidden = training.cached, training.hidden
BOTH = frozenset({"language", "vision"})


@pytest.fixture
def options(teacher, student, cached, tmp_path):
    return replace(training.train_options(teacher, student, cached, tmp_path / "run"), lora=2)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads transformers' old name
def test_losses_are_those_of_a_loop_written_by_hand(options):
    """peft's own wrapper and torch's AdamW on the same batches; tower and projector train whole, as --train-parts says."""
    options = replace(
        options,
        objective="sft",
        switch=False,
        cache=None,
        teacher=None,
        template="qa",
        schedule="constant",
        warmup=0.0,
        steps=5,
    )
    train(options)
    inputs = open_inputs(resolve_options(options))
    order = inputs.samples.order("none", options.seed, 4)
    stream = iter([*order.epoch(0), *order.epoch(1)])
    batches = [Collator(0)([inputs.samples[int(i)] for i in islice(stream, 4)]) for _ in range(5)]

    model = LlavaForConditionalGeneration.from_pretrained(options.student, dtype=torch.float32)
    layers = "(q|k|v|o|gate|up|down)_proj"
    torch.manual_seed(options.seed)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=rf".*language_model\.layers\.\d+\.\w+\.{layers}")
    )
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or "projector" in name:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr, weight_decay=0.0)
    losses = []
    for batch in batches:
        logits = wrapped(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]
        ).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [entry["loss_ce"] for entry in training.logged(options.output)] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    by_hand = wrapped.merge_and_unload().state_dict()
    found = weights(options.output)
    opened = LlavaForConditionalGeneration.from_pretrained(options.output).state_dict()
    assert opened.keys() == by_hand.keys() and len(found)
    for name, tensor in opened.items():
        if not name.endswith("k_proj.bias"):  # see `assert_same_weights`
            torch.testing.assert_close(tensor, by_hand[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", (None, "language,vision"))
def test_a_resumed_run_equals_an_undisturbed_one(options, monkeypatch, tmp_path, parts):
    options = replace(options, lora_dropout=0.1, lora_parts=parts)
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stop):
            train(options)
    kept = options.output / "checkpoint-4"
    assert {is_lora(name) for name in load_file(kept / checkpointing.LORA)} == {True}
    LlavaForConditionalGeneration.from_pretrained(kept)
    with pytest.raises(ConfigError, match=r"lora: run 2, now 3"):
        train(replace(options, lora=3))
    train(options)
    assert history(options.output) == history(whole.output)
    assert_same_weights(weights(options.output), weights(whole.output))
    moments = [load_file(run / "checkpoint-6/optimizer.safetensors") for run in (options.output, whole.output)]
    assert_same_weights(*moments)


def test_a_run_does_not_go_on_beside_other_frozen_weights(options, monkeypatch, tmp_path):
    """A checkpoint holds them merged, so they are read from the student's own folder again."""
    import tiny

    folder = tiny.checkpoint(tmp_path / "student", seed=1, width=16, layers=1)
    options = replace(options, student=folder)
    interrupt_after(monkeypatch, 3)
    with pytest.raises(Stop):
        train(options)
    monkeypatch.undo()
    tiny.checkpoint(folder, seed=7, width=16, layers=1)
    with pytest.raises(ConfigError, match="lora_base: run '.*', now '"):
        train(options)


def test_packing_accumulation_and_recomputed_activations_change_nothing(options, tmp_path):
    train(options)
    other = replace(
        options, output=tmp_path / "other", batch_size=2, accumulation=2, student_checkpointing=True, packing=64
    )
    train(other)
    assert_equal_runs(options.output, other.output)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads transformers' old name
def test_a_run_of_lora_alone_is_also_saved_as_an_adapter(options, student):
    """On the student's own checkpoint, opened by peft; where tower or projector trained too, there is none."""
    options = replace(options, lora_parts="language,vision", train_parts="language,vision")
    train(options)
    base = LlavaForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, options.output / checkpointing.LORA_FOLDER).eval()
    merged = LlavaForConditionalGeneration.from_pretrained(options.output).eval()
    ids = torch.tensor([[2] * 4 + [5, 6, 8, 4, 10]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = (model(input_ids=ids, pixel_values=pixels).logits for model in (merged, adapted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    before = LlavaForConditionalGeneration.from_pretrained(student).eval()(input_ids=ids, pixel_values=pixels).logits
    assert (ours - before).abs().max() > 0.01
    whole_tower = replace(options, output=options.output.with_name("more"), lora_parts=None)
    train(whole_tower)
    assert not (whole_tower.output / checkpointing.LORA_FOLDER).exists()


@pytest.mark.parametrize("family", ("llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "smolvlm", "mistral3"))
def test_merged_logits_are_those_of_the_trained_model(family, tmp_path):
    """Layers of the LLM and of the tower, without projector, embedding and head; saved and opened by plain transformers."""
    model = families.build(family, 0)
    columns = families.batch(family, model)
    plain = model.state_dict().keys()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = linear_layers(model, BOTH)
    assert names and not [name for name in names if "projector" in name or "merger" in name or "connector" in name]
    assert not [name for name in names if "lm_head" in name or "embed" in name]
    attach_lora(model, Lora(2, 3.0, parts=BOTH), seed=1)
    inputs = own_inputs(family, columns)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (is_lora(name) or component_of(name) == "projector")
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        trained = model(**inputs).logits
    merged, lora = merged_weights(model.state_dict(), 1.5)
    assert merged.keys() == plain and len(lora) == 2 * len(names)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in names}
    model.save_pretrained(tmp_path, state_dict=merged)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(**inputs).logits, trained, rtol=1e-4, atol=1e-4)


def test_targets_choose_layers():
    model = families.build("qwen2_5_vl", 0)
    found = chosen_layers(model, Lora(2, 4, parts=BOTH, targets=("q_proj", "qkv")))
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "qkv"}
    assert len(found) == len(language_model_of(model).layers) + len(model.model.visual.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ("ddp", "fsdp"))
def test_two_processes_equal_one(options, tmp_path, profile):
    options = replace(options, lora_parts="language,vision")
    train(replace(options, steps=4))
    changed = {"steps": 4, "batch_size": 1, "accumulation": 2, "lora": 2, "lora_parts": "language,vision"}
    done = two_processes(options, tmp_path, profile=profile, **changed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(options.output, tmp_path / "two")


DYING = """
import os
from switchkd.pipelines.training.trainer import SwitchTrainer
step = SwitchTrainer.training_step
def dying(self, *args, **kwargs):
    if self.state.global_step == 3: os._exit(9)
    return step(self, *args, **kwargs)
SwitchTrainer.training_step = dying
"""


@pytest.mark.slow
def test_a_sharded_run_goes_on(options, tmp_path):
    """Written by two processes with FSDP, resumed by them; equal to one process."""
    train(options)
    changed = {"batch_size": 1, "accumulation": 2, "lora": 2, "profile": "fsdp", "save_every": 1}
    for prelude, code in ((DYING, 1), ("", 0)):
        done = two_processes(options, tmp_path, prelude=prelude, **changed)
        assert done.returncode == code, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    assert_equal_runs(options.output, tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": 0}, "lora.*x>=1"),
        ({"lora": 2, "lora_targets": "q_proj,c_attn"}, "--lora-targets c_attn: .* layer in language; there are down_proj, g"),
        ({"lora": 2, "lora_targets": "q_proj,"}, "--lora-targets takes names separated by commas, found 'q_proj,'"),
        ({"lora": 2, "train_parts": "vision,projector"}, "--lora trains language, which --train-parts leaves frozen"),
        ({"lora": 2, "lora_parts": "vision", "train_parts": "language", "switch": False}, "--lora trains vision, which --t"),
        ({"lora": 2, "lora_parts": "projector"}, "--lora-parts takes language and vision, .* found 'projector'"),
        ({"lora_alpha": 8}, "--lora-alpha belongs to LoRA: pass --lora RANK, too"),
        ({"lora": 2, "lora_dropout": 1}, "lora-dropout.*<=0.9"),
        ({"lora": 2, "profile": "zero3"}, "--lora trains with --profile ddp or fsdp"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_refused_by_name(options, capsys, change, message):
    with pytest.raises(SystemExit) as end:
        main(["train", *flags_of(options, **change)])
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    import re

    assert re.search(message, said), said
    assert not options.output.exists()


def test_without_peft_a_run_says_what_to_install(options, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(
        ConfigError, match=r"--lora trains through peft, which is not installed: pip install 'switchkd\[lora\]'"
    ):
        train(options)
    assert not options.output.exists()


def test_frozen_weights_in_bfloat16_change_nothing(options, student, monkeypatch, tmp_path):
    """Of a checkpoint of bfloat16 numbers, half the bytes; one of others stays in float32."""
    from switchkd.pipelines.training import model_setup

    model = LlavaForConditionalGeneration.from_pretrained(student, dtype=torch.bfloat16)
    folder = shutil.copytree(student, tmp_path / "half")
    model.save_pretrained(folder)
    held, original = [], model_setup.hold_frozen_in_bfloat16
    monkeypatch.setattr(model_setup, "hold_frozen_in_bfloat16", lambda m: held.append(original(m)))
    options = replace(options, student=folder, precision="bfloat16", steps=4, eval_data=options.data, template="qa")
    train(options)
    monkeypatch.setattr(model_setup, "hold_frozen_in_bfloat16", lambda m: None)
    other = replace(options, output=tmp_path / "other")
    train(other)
    assert held == [7]
    assert history(options.output) == history(other.output)
    assert_same_weights(weights(options.output), weights(other.output))
    assert {tensor.dtype for tensor in weights(options.output).values()} == {torch.float32}
    plain = LlavaForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
    attach_lora(plain, Lora(2, 4.0), seed=0)
    assert original(plain) == 0


def test_the_plan_tells_what_trains(options, caplog):
    caplog.set_level("INFO", logger="switchkd")
    train(replace(options, steps=1))
    assert "LoRA: rank 2, alpha 4, dropout 0, beside 7 linear layers of language" in caplog.text
