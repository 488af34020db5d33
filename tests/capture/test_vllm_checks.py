"""What the vLLM backend checks before it starts, without vLLM: arguments of an image compared, logits compared with states."""

import re

import pytest
import torch

from switchkd.data.media import collate_media
from switchkd.errors import CheckpointError
from switchkd.losses.lm_head import LogitMap
from switchkd.models.families import FAMILIES
from switchkd.pipelines.capture.backends.vllm_checks import check_logit_map, compare_arguments
from switchkd.pipelines.capture.backends.vllm_media import split_media
from switchkd.pipelines.capture.backends.vllm_plugin import PREFIX, architecture_of, capture_architecture

PIXELS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
OURS = {"pixel_values": PIXELS, "image_grid_thw": torch.tensor([1, 4, 4])}
RED = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # a mean of ImageNet


def test_the_same_arguments_up_to_rounding():
    assert compare_arguments(OURS, OURS) == []
    assert compare_arguments(OURS, OURS | {"pixel_values": PIXELS + 0.05}) == []


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"pixel_values": (PIXELS - RED) / 0.225}, "pixel_values is off by .* normalised in another way"),
        ({"pixel_values": PIXELS * 58 + 120}, "pixel_values is off by .* normalised in another way"),
        ({"pixel_values": PIXELS[None]}, r"pixel_values is \(1, 3, 16, 16\) float32 there, \(3, 16, 16\) float32 here"),
        ({"pixel_values": PIXELS.bfloat16()}, r"pixel_values is .* bfloat16 there, .* float32 here"),
        ({"image_grid_thw": torch.tensor([1, 2, 8])}, "image_grid_thw has other values there"),
        ({"num_patches": torch.tensor(3)}, "it also wants num_patches"),
    ],
)
def test_arguments_that_differ_are_named(theirs, said):
    (found,) = compare_arguments(OURS, OURS | theirs)
    assert re.match(said, found)


def test_an_argument_that_vllm_does_not_take_is_named():
    assert compare_arguments(OURS, {"pixel_values": PIXELS}) == ["it has no image_grid_thw"]


@pytest.mark.parametrize(
    "asked", [LogitMap(), LogitMap(scale=0.25), LogitMap(softcap=3.0), LogitMap(0.5, 3.0)], ids=str
)
@pytest.mark.parametrize("done", [LogitMap(), LogitMap(scale=0.25), LogitMap(softcap=3.0), LogitMap(0.5, 3.0)], ids=str)
def test_logits_are_those_of_the_logit_map(asked, done):
    """Rounded as a teacher in bfloat16 rounds its states."""
    product = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)) * 4
    logits = done(product * (1 + 2**-9))
    if asked == done:
        check_logit_map("teacher", asked, product, logits)
        return
    with pytest.raises(
        CheckpointError, match="^teacher: vLLM's logits are not the trainer's, .*Use --backend transformers"
    ):
        check_logit_map("teacher", asked, product, logits)


def test_an_attribute_names_its_architecture():
    ours = capture_architecture("LlavaForConditionalGeneration")
    assert ours == f"{PREFIX}LlavaForConditionalGeneration"
    assert (
        architecture_of(f"{PREFIX}_0_32_0__Exaone4_5_ForConditionalGeneration") == "Exaone4_5_ForConditionalGeneration"
    )
    for other in ("LLAVA", "__path__", PREFIX, f"{PREFIX}_1__", ours):
        assert architecture_of(other) is None


# Images of a sample, one by one


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "smolvlm", "internvl", "mistral3"])
def test_media_of_several_images_are_divided_as_they_were_joined(family):
    """Columns as processors make them of one sample: tiles and pictures padded to the largest, patches in a row."""
    one, other, counts = IMAGES[family]
    joined = {}
    for name in one:
        first, second = one[name], other[name]
        if family == "smolvlm":  # [1, tiles of all images, …]
            joined[name] = torch.cat([first, second], dim=1)
        else:
            joined |= collate_media([{name: first}, {name: second}])
    for found, alone in zip(split_media(joined, FAMILIES[family], counts), (one, other), strict=True):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_media_that_do_not_fit_their_tokens_are_refused():
    columns = {"pixel_values": torch.ones(5, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"a column of 5 rows cannot be divided among images with \[4, 8\] tokens"):
        split_media(columns, FAMILIES["internvl"], (4, 8))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


IMAGES = {
    "llava": ({"pixel_values": random(1, 3, 8, 8)}, {"pixel_values": random(1, 3, 8, 8) + 1}, (4, 4)),
    "llava_next": (
        {"pixel_values": random(1, 3, 3, 8, 8), "image_sizes": torch.tensor([[16, 8]])},
        {"pixel_values": random(1, 5, 3, 8, 8), "image_sizes": torch.tensor([[16, 16]])},
        (7, 11),
    ),
    "qwen3_vl": (
        {"pixel_values": random(16, 12), "image_grid_thw": torch.tensor([[1, 4, 4]])},
        {"pixel_values": random(24, 12), "image_grid_thw": torch.tensor([[1, 4, 6]])},
        (4, 6),
    ),
    "smolvlm": (
        {"pixel_values": random(1, 1, 3, 8, 8), "pixel_attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
        {"pixel_values": random(1, 5, 3, 8, 8), "pixel_attention_mask": torch.ones(1, 5, 8, 8, dtype=torch.bool)},
        (4, 20),
    ),
    "internvl": ({"pixel_values": random(1, 3, 8, 8)}, {"pixel_values": random(4, 3, 8, 8)}, (4, 16)),
    "mistral3": (
        {"pixel_values": random(1, 3, 8, 12), "image_sizes": torch.tensor([[8, 12]])},
        {"pixel_values": random(1, 3, 16, 4), "image_sizes": torch.tensor([[16, 4]])},
        (6, 4),
    ),
}
