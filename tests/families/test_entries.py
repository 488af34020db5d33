"""The table of families: what it says of each, and what is refused."""

import families as tiny_families
import pytest
from transformers import AutoConfig

from switchkd.errors import CheckpointError
from switchkd.losses.lm_head import LogitMap
from switchkd.models.families import FAMILIES, MEDIA, family_of, logit_map_of


def test_every_entry_has_a_tiny_model():
    assert {tiny_families.config(name).model_type for name in tiny_families.FAMILIES} == set(FAMILIES) - {
        "switch_llava"
    }


def test_the_columns_of_media_are_those_of_a_batch():
    columns = {name for family in tiny_families.FAMILIES for name in tiny_families.media(family)}
    assert columns <= set(MEDIA)


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        (AutoConfig.for_model("qwen2"), "reads images and text"),
        (AutoConfig.for_model("mllama"), "takes no mm_encoder_outputs"),
        (AutoConfig.for_model("aya_vision"), "has no entry in switchkd/models/families.py"),
    ],
)
def test_another_model_is_refused_with_what_it_lacks(config, lacks):
    with pytest.raises(CheckpointError, match=f"models/here is a '{config.model_type}' model, which .*{lacks}"):
        family_of(config, "models/here")


def test_a_soft_cap_that_the_class_applies_is_a_logit_map():
    assert logit_map_of(tiny_families.config("paligemma2")) == LogitMap(softcap=3.0)
    assert logit_map_of(tiny_families.config("paligemma")).is_identity
    assert logit_map_of(tiny_families.config("llava")).is_identity


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("granite", {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
        ("cohere2", {"logit_scale": 0.25, "sliding_window": 16}, "logit_scale = 0.25"),
        ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ],
)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_logits_that_depend_on_the_program_are_refused(family, kind, fields, said):
    config = tiny_families.config(family, text={"model_type": kind} | fields)
    with pytest.raises(CheckpointError, match=f"models/here: its language model .{kind}. asks for {said}"):
        logit_map_of(config, "models/here")
