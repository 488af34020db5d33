"""The switch pathway (paper, section 3.1, eq. 5): the student's vision features through the teacher's projector and LLM."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from switchkd.models.components import language_model_of, projector_modules_of
from switchkd.models.families import family_of
from switchkd.models.features import Features, final_states, image_outputs, replay_features, states_at
from switchkd.models.hollow import tower_bypassed
from switchkd.models.packing import in_order, into_rows, out_of_rows, positions_in_rows
from switchkd.models.prefix_cache import SharedPrefixCache


def switch_states(
    teacher: Any,
    features: Features | Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    rows: Tensor,
    packing: Tensor | None = None,
    prefix_cache: SharedPrefixCache | None = None,
    *,
    media: Mapping[str, Tensor] | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Return the final hidden states behind z_switch = L_T(P_T(V_S(x)), text) at the requested rows.

    The teacher's weights are frozen, but its activations carry gradients: the gradient flows through L_T and P_T into `features`
    and on into the student's vision tower.

    Args:
        teacher: the frozen teacher; its vision tower is not used and need not exist.
        features: V_S(x) by cut, of the student's `capture_features`; carries a graph. A Llava takes its tensor [B, n, d_v], too.
        input_ids: [B, L]; per sample, as many image tokens as the projector outputs. attention_mask: [B, L].
        rows: [B, L] bool, the rows that predict supervised tokens (`positions.predicting_rows`).
        packing: layout of the samples in rows, see `packing.layout`; None gives each sample its own row.
        prefix_cache: keys and values of the shared prefix. With None, packed rows, or a family whose positions or masks do not
            allow it, all text runs in every batch, with gradient.
        media: of the same images as the teacher's processor makes it, which says how they are laid out; a Llava needs none.
        labels: [B, L], for families whose type ids depend on them.

    Returns:
        [P, d], in row-major order of `rows`; the teacher's LM head maps them to z_switch.

    Raises:
        ValueError: the number of image tokens is not that of the projected features.
    """
    if family_of(teacher.config).is_llava:
        return _llava(teacher, features, input_ids, attention_mask, rows, packing, prefix_cache)
    assert not isinstance(features, Tensor)
    with tower_bypassed(teacher), replay_features(teacher, features):
        outputs = image_outputs(teacher, media or {})
    if packing is not None:
        packing = in_order(packing, attention_mask)
    start, cache = 0, dict[str, Any]()
    if prefix_cache is not None and packing is None and family_of(teacher.config).keeps_prefix:
        is_image = input_ids == teacher.config.image_token_id
        embeds = teacher.get_input_embeddings()(input_ids)
        start, cache = prefix_cache.before(
            language_model_of(teacher), embeds, input_ids, is_image | rows | (attention_mask == 0)
        )
    states = final_states(
        teacher, input_ids, attention_mask, labels, media or {}, packing, outputs=outputs, start=start, **cache
    )
    return states_at(states, packing, rows[:, start:])


def of_samples(samples: Tensor, features: Tensor, input_ids: Tensor, model: Any) -> Tensor:
    """Return the features of some samples' images, of a Llava: all its images have the same number of tokens.

    Args:
        samples: [B] bool. features: [images, n, d], sample by sample. input_ids: [B, L], as `model` reads them.
    """
    tokens, images = (input_ids == model.config.image_token_id).sum(-1), len(features)
    return features[samples.repeat_interleave(tokens // (tokens.sum() // images), output_size=images)]


def _llava(
    teacher: Any,
    features: Features | Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    rows: Tensor,
    packing: Tensor | None,
    prefix_cache: SharedPrefixCache | None,
) -> Tensor:
    """See `switch_states`. The tower need not exist, and images may come in any order of the rows."""
    embeds = teacher.get_input_embeddings()(input_ids)
    is_image = input_ids == teacher.config.image_token_id
    ((cut, projector),) = projector_modules_of(teacher).items()
    entering = features if isinstance(features, Tensor) else features[cut]
    image_embeds = projector(entering.to(embeds.dtype))  # P_T(V_S(x)), [B, tokens, d]
    if int(is_image.sum()) != image_embeds.shape[0] * image_embeds.shape[1]:
        raise ValueError(f"{int(is_image.sum())} image tokens for projected features of {tuple(image_embeds.shape)}")
    # Under autocast, embeddings stay in float32 and the projector outputs bfloat16.
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(embeds.dtype))
    language = language_model_of(teacher)
    if packing is not None:
        states = language(
            inputs_embeds=into_rows(embeds, packing),
            position_ids=positions_in_rows(attention_mask, packing),
            use_cache=False,
        ).last_hidden_state
        return out_of_rows(states, packing, rows)
    start, cache = (
        (0, {})
        if prefix_cache is None
        else prefix_cache.before(language, embeds, input_ids, is_image | rows | (attention_mask == 0))
    )
    states = language(inputs_embeds=embeds[:, start:], attention_mask=attention_mask, use_cache=False, **cache)
    found: Tensor = states.last_hidden_state[rows[:, start:]]
    return found
