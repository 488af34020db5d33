"""Text before the image on the switch pathway: run once, without gradient, and the same as run in every batch."""

from dataclasses import replace

import pytest
import tiny
import torch
import training
from training import assert_equal_runs
from transformers import LlavaConfig, MistralConfig

from switchkd.data.templates import TEMPLATES
from switchkd.models.prefix_cache import SharedPrefixCache
from switchkd.models.switch import switch_states
from switchkd.models.vlm import LlavaWithoutVision, enable_activation_checkpointing, freeze
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.metrics import StepMetrics
from switchkd.pipelines.training.train import train

cached, options = training.cached, training.options
IMAGE, IMAGE_TOKENS, TEXT = 2, 4, 5
ROWS, LENGTH = 3, 16


def blind(language="qwen2", attention="sdpa", **more):
    """A teacher without a vision tower, float64; its heads share keys and values."""
    torch.manual_seed(0)
    if language == "mistral":
        text = MistralConfig(**tiny.text_config("llama").to_diff_dict() | {"sliding_window": None} | more)
    else:
        text = tiny.text_config(language)
        text = type(text)(**text.to_diff_dict() | {"num_key_value_heads": 1} | more)
    config = LlavaConfig(vision_config=tiny.vision_config(), text_config=text, image_token_index=IMAGE)
    model = freeze(LlavaWithoutVision(config).double())
    model.set_attn_implementation(attention)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def batch(text=TEXT, seed=0, rows=ROWS):
    """The same text, an image, other text behind it of unequal length: (features, ids, mask, rows that are supervised)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 14, (rows, LENGTH), generator=generator)
    ids[:, :text] = ids[:1, :text].clone()
    ids[:, text : text + IMAGE_TOKENS] = IMAGE
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, LENGTH - row :] = ids[row, LENGTH - row :] = 0
    wanted = torch.zeros(rows, LENGTH, dtype=torch.bool)
    wanted[:, text + IMAGE_TOKENS + 1 : -rows] = True
    features = torch.randn(rows, IMAGE_TOKENS, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    return features, ids, mask, wanted


def outcome(model, inputs, prefix_cache=None):
    """A loss of the states and its gradient."""
    states = switch_states(model, *inputs, prefix_cache=prefix_cache)
    weight = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).reshape(states.shape)
    loss = (states * weight).sin().sum()
    return loss.detach(), torch.autograd.grad(loss, inputs[0])[0]


def assert_same(model, inputs, prefix_cache, length):
    # transformers' own attention ("eager") takes its softmax in float32
    tolerance = 1e-10 if model.config.text_config._attn_implementation == "sdpa" else 1e-4
    for mine, whole in zip(outcome(model, inputs, prefix_cache), outcome(model, inputs), strict=True):
        torch.testing.assert_close(mine, whole, rtol=tolerance, atol=tolerance)
    assert prefix_cache.length == length


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("language", ("qwen2", "qwen3", "llama", "mistral"))
@pytest.mark.parametrize("recompute", (False, True))
def test_loss_and_gradient_are_the_same(language, attention, recompute):
    model, prefix_cache = blind(language, attention), SharedPrefixCache()
    if recompute:
        enable_activation_checkpointing(model.model.language_model)
    for seed in range(2):  # the text is not the same: computed anew
        assert_same(model, batch(seed=seed), prefix_cache, TEXT)


def test_the_text_runs_once_for_one_row():
    model, prefix_cache, seen = blind(), SharedPrefixCache(), []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, inputs: seen.append((*inputs[0].shape[:2], torch.is_grad_enabled()))
    )
    for _ in range(3):
        switch_states(model, *batch(), prefix_cache=prefix_cache)
    assert seen == [(1, TEXT, False), *[(ROWS, LENGTH - TEXT, True)] * 3]
    switch_states(model, *batch(text=3), prefix_cache=prefix_cache)  # begins alike, with less
    assert seen[4:] == [(1, 3, False), (ROWS, LENGTH - 3, True)]


def test_what_ends_the_shared_prefix():
    model, prefix_cache = blind(), SharedPrefixCache()
    features, ids, mask, wanted = batch()
    ids[1, 3] = 14  # one row goes another way
    assert_same(model, (features, ids, mask, wanted), prefix_cache, 3)
    wanted[2, 1] = True  # a supervised token before the image
    assert_same(model, (features, ids, mask, wanted), prefix_cache, 1)
    mask[0, 0] = 0  # padding on the left
    assert_same(model, (features, ids, mask, wanted), prefix_cache, 0)
    assert_same(model, batch(text=0), prefix_cache, 0)
    assert_same(model, batch(rows=1), prefix_cache, TEXT)


@pytest.mark.parametrize(
    ("language", "more"),
    [
        ("mistral", {"sliding_window": 4}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
        ),
        ("llama", {"is_causal": False}),
    ],
)
def test_a_model_that_needs_all_its_text_runs_it(language, more):
    model, prefix_cache = blind(language, **more), SharedPrefixCache()
    for _ in range(2):
        assert_same(model, batch(), prefix_cache, 0)


def test_under_autocast():
    model, prefix_cache = blind().float(), SharedPrefixCache()
    features, *inputs = batch()
    features = features.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, whole = (switch_states(model, features, *inputs, prefix_cache=k) for k in (prefix_cache, None))
    assert prefix_cache.length == TEXT
    torch.testing.assert_close(found, whole, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("checkpointed", (False, True))
def test_a_run_is_the_same_and_counts_what_ran(options, tmp_path, monkeypatch, checkpointed):
    """In a template with a system prompt; the estimate of FLOPs knows of it."""
    store = tmp_path / "s.zarr"
    made = CacheOptions(teacher=options.teacher, data=options.data, images=options.images, out=store)
    cache_teacher(replace(made, template="qwen2_base"))
    count, seen = StepMetrics.take, []

    def taking(self, *args):
        seen.append((self._image_tokens, self._image_pairs, self._images))
        return count(self, *args)

    monkeypatch.setattr(StepMetrics, "take", taking)
    one = replace(options, cache=store, steps=3, save_every=100, teacher_checkpointing=checkpointed)
    train(one)
    monkeypatch.setattr("switchkd.pipelines.training.trainer.SharedPrefixCache", lambda: None)
    other = replace(one, output=tmp_path / "other")
    train(other)
    assert_equal_runs(one.output, other.output)
    system = len(tiny.tokenizer()(TEMPLATES["qwen2_base"].system + "USER:")["input_ids"])
    assert system > 20
    for (tokens, pairs, images), (every, every_pair, _) in zip(seen[:3], seen[3:], strict=True):
        assert tokens == every - images * system
        assert pairs == pytest.approx(every_pair * tokens / every)
