"""Every family: final states, the switch pathway, its gradient, the hollow teacher, type ids and packing, against the model itself.

The reference is the class's own forward pass over ids, masks, pixels and type ids that are written here by hand.
"""

import json

import families as tiny
import pytest
import torch
from family_batches import own_inputs, own_logits, text_of, with_room
from transformers import AutoConfig, AutoModelForImageTextToText

from switchkd.fingerprints import component_of
from switchkd.losses.fused import SwitchStates
from switchkd.losses.objective import Objective
from switchkd.losses.signals import HiddenSignal
from switchkd.models.components import (
    language_model_of,
    lm_head_of,
    projector_modules_of,
    replace_lm_head,
    tower_layers_of,
    tower_of,
)
from switchkd.models.families import family_of
from switchkd.models.features import capture_features, final_states, media_of, text_arguments, type_ids
from switchkd.models.hollow import hollow_out, load_hollow
from switchkd.models.packing import layout, out_of_rows
from switchkd.models.prefix_cache import SharedPrefixCache
from switchkd.models.switch import switch_states
from switchkd.models.vlm import freeze, freeze_unused_vision, states_at_positions
from switchkd.positions import predicting_rows, targets

OTHERS = [family for family in tiny.FAMILIES if family != "llava"]
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def case(request):
    """(family, model, batch)."""
    model = tiny.build(request.param, 0)
    return request.param, model, tiny.batch(request.param, model)


def with_towers_of(model, other):
    """Give a model the vision tower V of another: every parameter of it, and none of its projector."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if component_of(name) == "vision":
                parameter.copy_(theirs[name])
    return model


def test_final_states_through_the_head_are_the_models_own_logits(case):
    family, model, columns = case
    with torch.no_grad():
        states = states_at_positions(model, columns)
    torch.testing.assert_close(lm_head_of(model).logits(states), own_logits(*case), **CLOSE)
    assert lm_head_of(model).logit_map.is_identity == (family != "paligemma2")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_equal_towers_the_switch_pathway_is_the_teacher(family):
    """So VSD is 0; and with a hollow teacher, whose own tower cannot see."""
    teacher = tiny.build(family, 1)
    student = with_towers_of(tiny.build(family, 0), teacher)
    columns = tiny.batch(family, teacher)
    rows, wanted = predicting_rows(columns["labels"]), own_logits(family, teacher, columns)
    if family != "llava":
        hollow_out(teacher)
    with torch.no_grad():
        with capture_features(student) as features:
            states_at_positions(student, columns)
        states = switch_states(
            teacher, features, *text_of(columns), rows, media=media_of(columns), labels=columns["labels"]
        )
        moved = {cut: value + 0.1 * torch.randn_like(value) for cut, value in features.items()}
        other = switch_states(
            teacher, moved, *text_of(columns), rows, media=media_of(columns), labels=columns["labels"]
        )
    torch.testing.assert_close(lm_head_of(teacher).logits(states), wanted, **CLOSE)
    assert (lm_head_of(teacher).logits(other) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_gradient_of_vsd_reaches_the_students_tower_only(family):
    """Through the loss of a step, in the LM head's place: VSD is what is minimised."""
    teacher, student = freeze(tiny.build(family, 1)), tiny.build(family, 0)
    columns = tiny.batch(family, teacher)
    media, rows, labels = media_of(columns), predicting_rows(columns["labels"]), columns["labels"]
    found = []
    with torch.no_grad():
        signal = HiddenSignal(
            states_at_positions(teacher, columns), teacher.lm_head.weight, logit_map=lm_head_of(teacher).logit_map
        )
    freeze_unused_vision(student, media)
    if family != "llava":
        hollow_out(teacher)

    def loss(states):
        through = switch_states(teacher, features, *text_of(columns), rows, media=media, labels=labels)
        on_image = torch.ones(len(states), dtype=torch.bool)
        switch = SwitchStates(through, lm_head_of(teacher), on_image)
        objective = Objective("dbild-rkl", switch=True)
        found.append(objective.fused(states, lm_head_of(student), targets(labels), signal, switch))
        return found[0].total

    with capture_features(student) as features, replace_lm_head(student, loss):
        arguments = text_arguments(student, *text_of(columns), labels, media)
        total = student(**arguments, **media, logits_to_keep=rows, use_cache=False).logits
    assert float(total.detach()) == float(found[0].total.detach())  # not soft-capped
    assert found[0].terms.vsd > 0

    through = switch_states(teacher, features, *text_of(columns), rows, media=media, labels=labels)
    through.square().sum().backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert {component_of(name) for name in reached} == {"vision"}
    wanted = {name for name, p in student.named_parameters() if p.requires_grad and component_of(name) == "vision"}
    assert reached >= {name for name in wanted if ".k_proj.bias" not in name and "qkv.bias" not in name}
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", OTHERS)
def test_a_hollow_teacher_reads_no_tower_from_disk(family, tmp_path):
    """The files that hold nothing else may be gone; what is read is exact."""
    folder = tiny.write_checkpoint(family, tmp_path / "model", 1, shards=True)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    held = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(held.values()):
        if {component_of(name) for name in held if held[name] == file} == {"vision"}:
            (folder / file).unlink()
    with pytest.raises(OSError, match="model-0"):
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    hollow, report = load_hollow(type(whole), AutoConfig.from_pretrained(folder), folder, "float32")
    assert not report["missing_keys"]
    theirs = whole.state_dict()
    for name, tensor in hollow.state_dict().items():
        assert component_of(name) == "vision" or torch.equal(tensor, theirs[name])
    assert not any(True for layer in tower_layers_of(hollow) for _ in layer.parameters())
    columns = tiny.batch(family, whole)
    rows = predicting_rows(columns["labels"])
    with torch.no_grad():
        with capture_features(whole) as features:
            wanted = states_at_positions(whole, columns)
        found = switch_states(
            hollow.eval(), features, *text_of(columns), rows, media=media_of(columns), labels=columns["labels"]
        )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_type_ids_matter(case):
    family, model, columns = case
    types = type_ids(model.config, columns["input_ids"], columns["labels"])
    given = own_inputs(family, columns)
    assert set(types) == {name for name in given if name.endswith("type_ids")}
    for name, value in types.items():
        mask = columns["attention_mask"].bool()
        assert torch.equal(value[mask], given[name][mask])
        rest = {other: value for other, value in given.items() if other != name}
        try:
            with torch.no_grad():
                without = model(**rest, use_cache=False).logits
        except ValueError:  # some classes ask for them
            continue
        rows = predicting_rows(columns["labels"])
        assert (without[rows] - own_logits(*case)).abs().max() > 0.01


def test_a_later_turn_is_no_prefix():
    """Tokens between two supervised spans do not look ahead: the answer before them would be seen by what predicts it."""
    config = tiny.config("paligemma")
    labels = torch.tensor([[-100, -100, 5, -100, 6, -100]])
    types = type_ids(config, torch.ones_like(labels), labels)
    assert types["token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 1]]
    assert not type_ids(config, torch.ones_like(labels), None)["token_type_ids"].any()


def packed(columns, order):
    """A layout of the two samples in one row."""
    lengths = columns["attention_mask"].sum(-1).tolist()
    return layout([order], lengths, columns["input_ids"].shape[1])


def test_packed_samples_are_as_alone_where_the_family_packs(case):
    _, model, columns = case
    columns = with_room(columns)
    rows, packing = predicting_rows(columns["labels"]), packed(columns, [0, 1])
    with torch.no_grad():
        alone = states_at_positions(model, columns)
        states = final_states(model, *text_of(columns), columns["labels"], media_of(columns), packing)
    found = out_of_rows(states, packing, rows)
    change = (found - alone).abs().max()
    assert (change < 1e-5) == family_of(model.config).packs, change


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in ("gemma3", "qwen3_5", "qwen3_5_moe")])
def test_the_switch_pathway_packs_samples_in_any_order(family):
    teacher = tiny.build(family, 1)
    columns = with_room(tiny.batch(family, teacher))
    rows, media, labels = predicting_rows(columns["labels"]), media_of(columns), columns["labels"]
    with torch.no_grad():
        with capture_features(teacher) as features:
            alone = states_at_positions(teacher, columns)
        for order in ([0, 1], [1, 0]):
            found = switch_states(
                teacher, features, *text_of(columns), rows, packed(columns, order), media=media, labels=labels
            )
            torch.testing.assert_close(found, alone, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_kept_prefix_changes_nothing(family):
    teacher = tiny.build(family, 1)
    columns = tiny.batch(family, teacher)
    rows, kept = predicting_rows(columns["labels"]), SharedPrefixCache()
    with torch.no_grad():
        with capture_features(teacher) as features:
            alone = states_at_positions(teacher, columns)
        for _ in range(2):
            found = switch_states(
                teacher,
                features,
                *text_of(columns),
                rows,
                prefix_cache=kept,
                media=media_of(columns),
                labels=columns["labels"],
            )
            torch.testing.assert_close(found, alone, **CLOSE)
    assert (kept.length > 0) == family_of(teacher.config).keeps_prefix


def test_components_are_told_apart_by_name(case):
    """A parameter's component, as hashes, training parts and loading read it, is that of the module that holds it."""
    _, model, _ = case
    language = {id(p) for p in [*language_model_of(model).parameters(), *model.lm_head.parameters()]}
    cuts = {id(p) for module in projector_modules_of(model).values() for p in module.parameters()}
    layers = {id(p) for layer in tower_layers_of(model) for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        component = component_of(name)
        assert (component == "language") == (id(parameter) in language), name
        assert component == "projector" or id(parameter) not in cuts, name
        assert component == "vision" or id(parameter) not in layers, name
    assert {component_of(name) for name, _ in model.named_parameters()} == {"vision", "projector", "language"}
    assert tower_of(model) is not None


def test_text_only_batches(case):
    """Samples without an image, padded and packed."""
    family, model, _ = case
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[:, 8], mask[1, 6:] = 0, 0
    ids = torch.randint(20, 90, (2, 9), generator=torch.Generator().manual_seed(3)) * mask
    labels = torch.where((torch.arange(9) > 3) & mask.bool(), ids, -100)
    text = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    wanted = own_logits(family, model, text)
    packing = layout([[0, 1]], [8, 6], 9)
    with torch.no_grad():
        torch.testing.assert_close(lm_head_of(model).logits(states_at_positions(model, text)), wanted, **CLOSE)
        if family_of(model.config).packs:
            states = final_states(model, ids, mask, labels, {}, packing)
            logits = lm_head_of(model).logits(out_of_rows(states, packing, predicting_rows(labels)))
            torch.testing.assert_close(logits, wanted, **CLOSE)


def two_images_a_sample(family, model):
    """A batch of one sample that holds both images of `families.media`, with text between them."""
    columns = tiny.media(family)
    if family in ("smolvlm", "idefics3"):  # tiles by sample
        columns = {name: value.flatten(0, 1)[None] for name, value in columns.items()}
    if family == "llava_onevision":  # several images of a sample are not tiled
        columns = columns | {"pixel_values": columns["pixel_values"][:, :1], "batch_num_images": torch.tensor([2])}
    with torch.no_grad():
        features = model.model.get_image_features(**columns, return_dict=True).pooler_output
    counts = [len(states) for states in features]
    image = model.config.image_token_id
    ids = [1, 60]
    for count in counts:
        ids += [61, *[image] * count, 62]
    ids = torch.tensor([[*ids, *range(63, 72)]])
    labels = torch.full_like(ids, -100)
    labels[:, -5:] = ids[:, -5:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels} | columns


def test_several_images_a_sample(case):
    """States, and the switch pathway with equal towers."""
    family, model, _ = case
    columns = two_images_a_sample(family, model)
    rows, wanted = predicting_rows(columns["labels"]), own_logits(family, model, columns)
    with torch.no_grad():
        with capture_features(model) as features:
            states = states_at_positions(model, columns)
        switched = switch_states(
            model, features, *text_of(columns), rows, media=media_of(columns), labels=columns["labels"]
        )
    torch.testing.assert_close(switched, states, rtol=0, atol=1e-6)
    torch.testing.assert_close(lm_head_of(model).logits(states), wanted, **CLOSE)
