"""Samples that share a row: the same loss, gradients and weights as without, in any row length; and what cannot share one."""

import json
import tempfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import reference
import tiny
import torch
import training
import varlen
from hypothesis import given
from hypothesis import strategies as st
from training import Stop, assert_equal_runs, assert_same_weights, history, interrupt_after, two_processes, weights
from transformers import (
    AutoModel,
    BloomConfig,
    Gemma3TextConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    Qwen2VLTextConfig,
    TrainingArguments,
)

from switchkd.data.encoded import EncodedSample, collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError
from switchkd.fingerprints import digest_sample
from switchkd.losses.objective import Objective
from switchkd.models import block_attention, varlen_attention
from switchkd.models.block_attention import attend_in_blocks, enable_packing, uses_block_attention
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.packing import into_rows, layout, out_of_rows, pack_rows, positions_in_rows
from switchkd.models.vlm import freeze, load_model
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.stored_teacher import StoredHidden, StoredTopK
from switchkd.pipelines.training.batches.collator import Collator, placeholder_sample
from switchkd.pipelines.training.live.teacher_source import LiveTeacher
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import predicting_rows
from switchkd.stores import TeacherStore

cached, hidden, options = training.cached, training.hidden, training.options
ROW_TOKENS = {"each its own": 2, "some too long": 14, "two or three": 32, "one row": 10_000}


def area(rows, lengths):
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 90))
def test_rows_hold_every_sample_once_and_no_more_than_they_may(lengths, row_tokens):
    rows = pack_rows(lengths, row_tokens)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[sample] for sample in row) <= row_tokens
    assert area(rows, lengths) <= area([[sample] for sample in range(len(lengths))], lengths)


@pytest.mark.parametrize(
    ("lengths", "row_tokens", "expected"),
    [
        ([5, 5, 5], 20, [5, 5, 5]),  # nothing to gain: rows stay short, since attention costs the square
        ([4, 6, 3, 7], 10, [10, 10]),
        ([4, 6, 3, 7], 9, [7, 7, 6]),  # first fit would make 7 + 0, 6 + 3, 4
        ([30, 4, 4], 8, [30, 8]),  # longer than a row may be
        ([7], 100, [7]),
    ],
)
def test_rows_have_little_padding(lengths, row_tokens, expected):
    rows = pack_rows(lengths, row_tokens)
    assert sorted((sum(lengths[i] for i in row) for row in rows), reverse=True) == expected


def test_a_layout_there_and_back():
    lengths, rows = [3, 1, 4], [[2], [1, 0]]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    batch = torch.arange(15).view(3, 5)
    source = layout(rows, lengths, 5)
    assert into_rows(batch, source).tolist() == [[10, 11, 12, 13], [5, 0, 1, 2]]
    assert positions_in_rows(mask, source).tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    wanted = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    back = out_of_rows(into_rows(batch, source).unsqueeze(-1), source, wanted)
    assert back.flatten().tolist() == batch[wanted].tolist()
    padded = layout([[0], [1, 2]], lengths, 5)
    assert into_rows(mask, padded).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert positions_in_rows(mask, padded).tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]


@pytest.mark.parametrize("samples", ([[3, 1, 4], [6, 2]], [[8], [8]], [[1, 1, 1, 5], [4, 4]]), ids=str)
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_attention_in_blocks_by_a_loop(samples, kv_heads):
    """Heads that share keys and values, too."""
    reference.assert_attends_within_samples(attend_in_blocks, samples, kv_heads)


def made(words, supervised):
    """A sample of text alone, with any mask."""
    ids, mask = np.array(words, np.int32), np.array(supervised, np.bool_)
    return EncodedSample(ids, mask, None, digest_sample(ids, mask, None))


@pytest.fixture(scope="module")
def encoded(student, cached):
    """Nine samples, images, text alone, two turns, and the store that has them."""
    encoder = SampleEncoder(open_checkpoint(student), TEMPLATES["qa"], cached / "images", 128)
    samples, store = SampleFile(cached / "data.json"), TeacherStore.open(cached / "stores/s.zarr")
    return [(encoder.encode(samples[i]), i) for i in range(9)], store


@pytest.fixture(scope="module")
def awkward(encoded, student):
    """Also a blank image without a position, text without one, and text whose very first token is marked as supervised."""
    silent = made([5, 6, 7], [False, False, False])
    first = made([10, 5, 6, 11, 1], [True, False, False, True, True])
    return [sample for sample, _ in encoded[0][:6]] + [
        silent,
        placeholder_sample(SampleEncoder(open_checkpoint(student), TEMPLATES["qa"], None, 64)),
        first,
    ]


def terms_and_gradients(student, teacher, batch, source="live", blocks=False, **of_objective):
    """The loss of one batch in float64, as the trainer computes it: total, CE, Align, VSD, and all gradients."""
    model = load_model(open_checkpoint(student), dtype="float64").train()
    whole = freeze(load_model(open_checkpoint(teacher), dtype="float64"))
    for each in (model, whole) if blocks else ():
        enable_packing(each.model.language_model, "here", varlen=blocks == "varlen")
        assert uses_block_attention(each.model.language_model)
    trainer = SwitchTrainer(
        objective=Objective(**of_objective),
        source={
            "live": LiveTeacher(whole, 15),
            "hidden": StoredHidden(whole.lm_head.weight, 15, exact_knee=False),
            "topk": StoredTopK(15, "student"),
        }[source],
        teacher=whole if of_objective.get("switch", True) else None,
        model=model,
        args=TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", remove_unused_columns=False),
    )
    loss = trainer.loss_terms(model, Batch.of(batch))
    loss.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [loss.total.detach(), *(part for part in loss.terms if part is not None)], gradients


def assert_equal(mine, theirs):
    for a, b in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert mine[1].keys() == theirs[1].keys()
    for name in mine[1]:
        torch.testing.assert_close(mine[1][name], theirs[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def alone(awkward, student, teacher):
    """Sums over batches of one sample each."""
    found = [terms_and_gradients(student, teacher, collate([sample], 0)) for sample in awkward if sample.positions]
    terms = [torch.stack([each[i] for each, _ in found if i < len(each)]).sum() for i in range(4)]
    names = {name for _, gradients in found for name in gradients}
    return terms, {name: sum(gradients[name] for _, gradients in found if name in gradients) for name in names}


@pytest.fixture
def kernel(monkeypatch):
    """The variable-length kernel's stand-in; its calls are counted."""
    calls = []

    def count(*given, **options):
        calls.append(given)
        return varlen.varlen_attn(*given, **options)

    monkeypatch.setattr(varlen_attention, "kernel_for", lambda device, dtype: count)
    return calls


@pytest.mark.parametrize("blocks", (False, True, "varlen"), ids=("masks", "blocks", "varlen"))
@pytest.mark.parametrize("row_tokens", ROW_TOKENS.values(), ids=ROW_TOKENS)
def test_loss_and_gradients_are_those_of_samples_alone(awkward, alone, student, teacher, row_tokens, blocks, kernel):
    """Against every sample in a batch of its own: no padding, no neighbour, a sum over batches."""
    batch = Collator(0, row_tokens=row_tokens)([(sample, 0) for sample in awkward])
    assert sorted(len(sample.input_ids) for sample in awkward) == [3, 4, 5, 7, 11, 11, 11, 11, 17]
    assert batch["packing"].shape[0] == {2: 9, 14: 7, 32: 3, 10_000: 1}[row_tokens]
    found = terms_and_gradients(student, teacher, batch, blocks=blocks)
    assert bool(kernel) == (blocks == "varlen")
    assert found[1].keys() >= alone[1].keys()  # the blank image adds gradients of 0
    assert_equal((found[0], {name: found[1][name] for name in alone[1]}), alone)
    assert not any(gradient.any() for name, gradient in found[1].items() if name not in alone[1])


@pytest.mark.parametrize("source", ("topk", "hidden", "live"))
@pytest.mark.parametrize("row_tokens", (14, 10_000))
def test_every_source_of_the_teachers_word(encoded, student, teacher, cached, hidden, source, row_tokens):
    items, store = encoded
    if source == "hidden":
        store = TeacherStore.open(hidden)
    rows = [
        Collator(0, payload=lambda items: store.payload([index for _, index in items]), row_tokens=tokens)(items)
        for tokens in (None, row_tokens)
    ]
    for batch in rows:
        if "teacher_hidden" in batch:
            batch["teacher_hidden"] = batch["teacher_hidden"].double()
    objective = {"normalize_by": "sample", "align_weight": 0.7, "vsd_weight": 0.3}
    assert_equal(
        *(terms_and_gradients(student, teacher, batch, source, "packing" in batch, **objective) for batch in rows)
    )


@pytest.mark.parametrize("samples", (slice(3, 4), slice(0, 1)), ids=("text alone", "an image"))
def test_batches_of_one_kind(encoded, student, teacher, samples):
    batches = [Collator(0, row_tokens=tokens)([encoded[0][samples][0]] * 3) for tokens in (None, 100)]
    assert_equal(*(terms_and_gradients(student, teacher, batch, blocks="packing" in batch) for batch in batches))


def test_no_sample_predicts_the_first_token_of_the_next(awkward):
    batch = Collator(0, row_tokens=10_000)([(sample, 0) for sample in awkward])
    rows, source = predicting_rows(batch["labels"]), batch["packing"]
    labels = into_rows(batch["labels"], source)
    naive = predicting_rows(labels)  # as if the row were one sample
    starts = positions_in_rows(batch["attention_mask"], source) == 0
    assert (naive[:, :-1] & starts[:, 1:]).any()
    assert not (into_rows(rows, source)[:, :-1] & starts[:, 1:]).any()
    assert into_rows(rows, source).sum() == sum(sample.positions for sample in awkward)


def running_on(attention_mask, source):
    """Position ids of a row that is one sequence: a plain causal mask."""
    return torch.arange(source.shape[1]).expand(source.shape)


@pytest.mark.parametrize("blocks", (False, True, "varlen"), ids=("masks", "blocks", "varlen"))
@pytest.mark.parametrize(
    ("where", "changed"), [("switchkd.models.packing", (0, 1, 2, 3)), ("switchkd.models.switch", (0, 3))]
)
def test_a_plain_causal_mask_gives_another_loss(awkward, student, teacher, monkeypatch, where, changed, blocks, kernel):
    """What the tests above would find if samples saw each other, on the standard pathways or on the switch pathway."""
    batch = Collator(0, row_tokens=10_000)([(sample, 0) for sample in awkward])
    right = terms_and_gradients(student, teacher, batch, blocks=blocks)[0]
    monkeypatch.setattr(f"{where}.positions_in_rows", running_on)
    wrong = terms_and_gradients(student, teacher, batch, blocks=blocks)[0]
    assert {i for i in range(4) if abs(wrong[i] - right[i]) > 1e-5 * right[i]} == set(changed)  # total, CE, Align, VSD


def logged(run):
    return [e for e in json.loads((run / "summary.json").read_text())["history"] if "loss_ce" in e]


@pytest.mark.parametrize(
    "changed",
    [
        {"packing": 32},
        {"packing": 10_000, "batch_size": 2, "accumulation": 2, "workers": 1},
        {"packing": 2, "student_checkpointing": True, "teacher_checkpointing": True},
    ],
    ids=("rows of two or three", "accumulated", "checkpointed"),
)
def test_a_packed_run_has_the_weights_of_an_unpacked_one(options, monkeypatch, tmp_path, changed):
    train(options)
    packed = replace(options, output=tmp_path / "packed", **changed)
    if changed["packing"] == 32:
        monkeypatch.setattr(block_attention, "is_plain", lambda config: False)  # masks
    train(packed)
    assert_equal_runs(options.output, packed.output)
    configs = [json.loads((run / "config.json").read_text()) for run in (options.output, packed.output)]
    assert configs[0] == configs[1]
    if changed["packing"] == 10_000:
        assert all(entry["padding_share"] == 0 for entry in logged(packed.output))
    elif changed["packing"] == 2:
        shares = [[entry["padding_share"] for entry in logged(run)] for run in (options.output, packed.output)]
        assert shares[0] == pytest.approx(shares[1])


@pytest.mark.parametrize("mode", ("hidden", "live"))
def test_packed_runs_from_hidden_states_and_from_the_live_teacher(options, hidden, tmp_path, mode):
    changed = {"cache": hidden} if mode == "hidden" else {"cache": None, "teacher_mode": "live", "template": "qa"}
    plain = replace(options, steps=3, mean="sample", **changed)
    train(plain)
    packed = replace(plain, output=tmp_path / "packed", packing=40)
    train(packed)
    assert_equal_runs(plain.output, packed.output)
    mine, other = (logged(run)[2] for run in (packed.output, plain.output))
    assert mine["padding_share"] < other["padding_share"]
    for name in ("positions", "vsd_gradient_norm", "knee_teacher_mean", "knee_student_p95"):
        assert mine[name] == pytest.approx(other[name], rel=1e-3), name


def test_a_packed_run_goes_on_where_it_stopped_and_may_go_on_unpacked(options, monkeypatch, tmp_path):
    packed = replace(options, packing=32)
    whole = replace(packed, output=tmp_path / "whole")
    train(whole)
    for output, after in ((tmp_path / "packed", packed), (tmp_path / "unpacked", options)):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 3)
            with pytest.raises(Stop):
                train(replace(packed, output=output))
        train(replace(after, output=output))
    assert history(whole.output) == history(tmp_path / "packed")
    assert_same_weights(weights(whole.output), weights(tmp_path / "packed"))
    assert_equal_runs(whole.output, tmp_path / "unpacked")


@pytest.mark.slow
@pytest.mark.parametrize("profile", ("ddp", "fsdp"))
def test_two_processes_that_pack_equal_one_that_does_not(options, tmp_path, profile):
    train(replace(options, steps=3))
    done = two_processes(options, tmp_path, steps=3, batch_size=2, packing=60, profile=profile)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(options.output, tmp_path / "two")


def language(config, **more):
    made = config(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    return AutoModel.from_config(made)


APART = {kind: partial(tiny.text_config, kind, rows=15) for kind in tiny.LANGUAGES}
SLIDING = {
    "mistral": partial(MistralConfig, sliding_window=3),
    "gemma3": partial(Gemma3TextConfig, head_dim=16, sliding_window=3),
}
MIXING = {
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"]}),  # a convolution reaches into its neighbour
    "bloom": (BloomConfig, {}),  # tells positions by the mask
    "mamba": (MambaConfig, {}),
    "qwen2_vl": (
        Qwen2VLTextConfig,  # positions of three axes
        {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e4}},
    ),
}


@pytest.mark.parametrize("kind", [*APART, *SLIDING])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_language_models_that_keep_samples_apart(kind, dtype):
    torch.manual_seed(0)
    model = AutoModel.from_config(APART[kind]()) if kind in APART else language(SLIDING[kind])
    enable_packing(model.to(dtype), "here")
    assert model.training
    assert uses_block_attention(model) == (kind in APART)


def test_eager_attention_stays_what_it_is():
    model = AutoModel.from_config(tiny.text_config(rows=15), attn_implementation="eager")
    enable_packing(model, "here")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.filterwarnings("ignore")
def test_language_models_that_do_not_are_refused(kind):
    config, more = MIXING[kind]
    with pytest.raises(
        ConfigError, match=rf"language model of here \({kind}.*not keep samples of one row apart: .* leave"
    ):
        enable_packing(language(config, **more), "here")


def test_layers_that_mix_are_refused_by_their_config(options, tmp_path, monkeypatch):
    layers = partial(Lfm2Config, layer_types=["conv", "full_attention"])
    monkeypatch.setitem(tiny.LANGUAGES, "lfm2", layers)
    folder = tiny.checkpoint(tmp_path / "lfm2", 1, language="lfm2")
    with pytest.raises(ConfigError, match=r"language model of .*lfm2 \(lfm2\) has layers of kind conv, which mix"):
        train(replace(options, packing=32, student=folder))
    assert not options.output.exists()


def test_refused_before_the_first_step(options, monkeypatch):
    baselines = {"objective": "llava-kd", "switch": False, "teacher_mode": "live", "template": "qa"}
    with pytest.raises(ConfigError, match="llava-kd compares images sample by sample: leave --packing out"):
        train(replace(options, packing=32, **baselines))
    assert not options.output.exists()
    monkeypatch.setattr(block_attention, "TOLERANCE", -1.0)
    with pytest.raises(ConfigError, match=r"language model of .*student.* \(qwen2\) does not keep"):
        train(replace(options, packing=32, steps=1))
    train(replace(options, steps=1))  # and the same output may be used without
