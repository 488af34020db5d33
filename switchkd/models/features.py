"""Vision features V(x) on their way into the projector: captured from one model, replayed in another; and what runs around them.

    features = capture_features(student)          what enters each module of the student's projector, with graph
    outputs  = image_outputs(teacher, media)      inside replay_features(teacher, features): the teacher's own code around its own P
    states   = final_states(teacher, …, outputs)  the teacher's own forward pass with these features in place of pixels

Masks, positions, the joining of tiles and DeepStack are the model class's own code in every family.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from switchkd.models.components import projector_modules_of
from switchkd.models.families import MEDIA, family_of
from switchkd.models.packing import into_rows, out_of_rows, positions_in_rows, text_inputs
from switchkd.positions import IGNORED

Features = dict[str, Tensor]
"""V(x) by the cut that it enters, see `families.Family.cuts`; Llava's is [images, n, d_v], others have their own shapes."""


@contextmanager
def capture_features(model: Any) -> Iterator[Features]:
    """Capture V(x), with graph, of the image batch that `model` processes inside the block; empty if it processes none.

    Hooks record the inputs of the projector's modules as the model's own forward pass computed them, so the choice of layer, CLS
    handling and any wrapper (DistributedDataParallel, FSDP) are unaffected.
    """
    captured: Features = {}

    def record(cut: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            assert cut not in captured, "one image batch in a block"
            captured[cut] = inputs[0] if inputs else next(iter(named.values()))

        return hook

    with _hooks(model, record):
        yield captured


@contextmanager
def replay_features(model: Any, features: Features) -> Iterator[None]:
    """Let the modules of `model`'s projector read `features` inside the block, whatever is passed to them."""

    def put(cut: str) -> Callable[..., Any]:
        def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            value = features[cut].to(next(module.parameters()).dtype)
            if inputs:
                return (value, *inputs[1:]), named
            return (), named | {next(iter(named)): value}

        return hook

    with _hooks(model, put):
        yield


@contextmanager
def _hooks(model: Any, make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    # A compiled model has a graph break here: the hooks access state outside the model.
    hooks = [
        module.register_forward_pre_hook(torch.compiler.disable(make(cut)), with_kwargs=True)
        for cut, module in projector_modules_of(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def media_of(columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the columns of a batch that are media: pixels, and what says how they are laid out."""
    return {name: columns[name] for name in MEDIA if columns.get(name) is not None}


def media_for(model: Any, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch's media as arguments of a model: on its device, pixels in its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in media.items()
        if name in family_of(model.config).media
    }


def image_outputs(model: Any, media: Mapping[str, Tensor]) -> Any:
    """Run the vision tower and the projector: the output of the class's `get_image_features`, as `final_states` takes it.

    Args:
        media: columns of the images of a batch, see `families.Family.media`, of any device and dtype.
    """
    takes = inspect.signature(inspect.unwrap(type(model.model).get_image_features)).parameters
    given = {name: value for name, value in media_for(model, media).items() if name in takes}
    return model.model.get_image_features(**given, return_dict=True)


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return what the language model reads of `image_outputs`: the features of each image, and those that enter deeper layers."""
    return tensors_in([outputs.pooler_output, getattr(outputs, "deepstack_features", None)])


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a tensor, None, or a sequence of such."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value or () for tensor in tensors_in(item)]


def type_ids(config: Any, input_ids: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Return the argument that tells a model what each token is, by its family's rule: {name: [B, L] int64}, or {}.

    Args:
        input_ids: [B, L]. labels: [B, L], needed where the rule is "suffix"; None if nothing is supervised, as in generation.
    """
    name, _, ones = family_of(config).type_ids.partition(" = ")
    if ones == "image":
        return {name: (input_ids == config.image_token_id).long()}
    if ones == "suffix":
        supervised = torch.zeros_like(input_ids) if labels is None else (labels != IGNORED).long()
        return {name: supervised.cummax(-1).values}
    return {}


def text_arguments(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None,
    media: Mapping[str, Tensor],
    packing: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the arguments of a VLM's forward pass that concern the text: ids, mask or positions, and type ids.

    Args:
        input_ids, attention_mask, labels: [B, L]. media: of the batch's images. packing: [R, N], see `packing.layout`; images must
            come in the order of the rows.
    """
    family = family_of(model.config)
    types = type_ids(model.config, input_ids, labels)
    found = text_inputs(input_ids, attention_mask, packing)
    if packing is None:
        return found | types
    if family.mrope:
        axes = _axes(model, input_ids, attention_mask, types, media)
        found["position_ids"] = torch.cat([found["position_ids"][None], into_rows(axes, packing).movedim(-1, 0)])
    elif family.first_position:
        found["position_ids"] = positions_in_rows(attention_mask, packing) + family.first_position
    return found | {name: into_rows(value, packing) for name, value in types.items()}


def _axes(
    model: Any, input_ids: Tensor, attention_mask: Tensor, types: Mapping[str, Tensor], media: Mapping[str, Tensor]
) -> Tensor:
    """Return M-RoPE's positions of samples, [B, L, 3]; without an image in the batch, plain ones, as in the model's own pass."""
    if "image_grid_thw" not in media:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None, :, None].expand(*input_ids.shape, 3)
    grid = media["image_grid_thw"]
    found, _ = model.model.get_rope_index(input_ids, image_grid_thw=grid, attention_mask=attention_mask, **types)
    axes: Tensor = found.movedim(0, -1)
    return axes


def final_states(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None,
    media: Mapping[str, Tensor],
    packing: Tensor | None = None,
    *,
    outputs: Any = None,
    start: int = 0,
    **more: Any,
) -> Tensor:
    """Run a VLM of any family without its LM head.

    Args:
        input_ids, attention_mask, labels, packing: see `text_arguments`; on the model's device.
        media: of the batch's images; empty in a text-only batch.
        outputs: the result of `image_outputs`, read in place of the pixels.
        start: first token that runs; those before it are in a cache among `more`, the arguments of the model's body.

    Returns:
        [B, L - start, d], or [R, N, d] with `packing`; after the final norm.
    """
    take = media_for(model, media)
    text = text_arguments(model, input_ids, attention_mask, labels, take, packing)
    if start:
        text |= {name: value[:, start:] for name, value in text.items() if name != "attention_mask"}
    if outputs is not None:
        seen = inspect.signature(type(model.model).forward).parameters
        take = {name: value for name, value in take.items() if name in seen and name not in OF_PIXELS}
        more["mm_encoder_outputs"] = {"image": outputs}
    states: Tensor = model.model(**text, **take, use_cache=False, **more).last_hidden_state
    return states


OF_PIXELS = ("pixel_values", "pixel_attention_mask", "batch_num_images")  # media that only the tower reads


def states_at(states: Tensor, packing: Tensor | None, rows: Tensor) -> Tensor:
    """Gather the states of the wanted tokens: [B, L, d] or [R, N, d], with `rows` [B, L] bool → [P, d] in row-major order."""
    return states[rows] if packing is None else out_of_rows(states, packing, rows)


def cut_shapes(features: Features) -> dict[str, tuple[int, int]]:
    """Return (rows, width) of each cut's features, over all images."""
    return {cut: (value.numel() // value.shape[-1], value.shape[-1]) for cut, value in features.items()}
