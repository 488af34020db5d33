"""Two tokenizers: the mapped distributions, the aligned positions, the loss, and a student that learns from such a teacher."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import assert_equal_runs, two_processes
from transformers import PreTrainedTokenizerFast

from switchkd.data.tokenization import ConversationTokenizer
from switchkd.errors import CheckpointError, ConfigError
from switchkd.losses.cross_tokenizer import VocabMap, align_positions, loss_over_vocabularies, map_vocabularies
from switchkd.losses.fused import SwitchStates
from switchkd.losses.lm_head import LMHead
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal, HiddenSignal
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.positions import teacher_weights

TEXT = "a red circle. what color is it? the shape is a blue square, and it is blue blue red; naïve café 日本 🙂"


def bpe(size, end, metaspace=False):
    """A tokenizer trained on TEXT: byte-level, or with "▁" for a space and byte fallback."""
    if metaspace:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        special = ["<pad>", end, "<image>", *alphabet]
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<pad>", end, "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token=end, extra_special_tokens=["<image>"]
    )


@pytest.fixture(scope="module")
def tokenizers():
    return bpe(300, "<|end|>"), bpe(280, "</s>")


def test_shared_entries_stand_for_the_same_text(tokenizers):
    ours, theirs = tokenizers
    found = map_vocabularies(ours, theirs, len(ours), len(theirs))
    pairs = list(zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True))
    assert (ours.eos_token_id, theirs.eos_token_id) in pairs
    for s, t in pairs:
        if s != ours.eos_token_id:
            assert ours.convert_ids_to_tokens(s) == theirs.convert_ids_to_tokens(t)
    assert 256 < len(pairs) < len(ours)  # all bytes, and merges that both learned
    assert len({s for s, _ in pairs}) == len({t for _, t in pairs}) == len(pairs)


def test_byte_level_and_metaspace_meet_in_their_bytes(tokenizers):
    ours, theirs = tokenizers[0], bpe(330, "</s>", metaspace=True)
    found = map_vocabularies(ours, theirs, len(ours), len(theirs))
    by_text = {ours.decode([s]): theirs.decode([t]) for s, t in zip(found.student_ids, found.teacher_ids, strict=True)}
    printable = {s: t for s, t in by_text.items() if s.isascii() and s.strip() and "<" not in s}
    assert len(printable) > 20
    assert all(s.strip() == t.strip() for s, t in printable.items())  # decoders may trim a leading space


def test_mapped_logits_are_the_probabilities_of_the_events():
    logits = torch.randn(4, 9, dtype=torch.float64)
    ids = torch.tensor([7, 0, 3])
    found = VocabMap(ids, ids, 8, 9).of_student(logits)  # row 8 is padding on the student's side
    probabilities = logits[:, :8].softmax(-1)
    others = [i for i in range(8) if i not in ids.tolist()]
    expected = torch.cat([probabilities[:, ids], probabilities[:, others].sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(found.softmax(-1), expected)
    torch.testing.assert_close(found[:, :3], logits[:, ids])


def test_a_side_without_a_rest_stays_finite():
    mapped = VocabMap(torch.arange(3), torch.arange(3), 3, 5)
    assert mapped.of_student(torch.randn(2, 3)).isfinite().all()
    assert mapped.of_student(torch.randn(2, 3)).shape == mapped.of_teacher(torch.randn(2, 5)).shape == (2, 4)


def naive_partners(ours, theirs, text):
    """For each of our tokens the one of theirs before which the very same text was said, by decoding prefixes."""
    sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs)]
    prefixes = [[t.decode(ids[:n]) for n in range(len(ids))] for t, ids in zip((ours, theirs), sides, strict=True)]
    return [prefixes[1].index(prefix) if prefix in prefixes[1] else -1 for prefix in prefixes[0]]


def test_positions_are_aligned_by_the_text_before_them(tokenizers):
    text = "a red circle, and it is a blue shape"
    segments = [("what?", False), (text, True), ("what color?", False), ("blue", True)]
    starts = []
    for tokenizer in tokenizers:
        words = ConversationTokenizer(tokenizer, tokenizer.convert_tokens_to_ids("<image>"), special=True)
        starts.append(words(segments).starts)
    found = align_positions(*starts)
    first = naive_partners(*tokenizers, text)
    assert found[: len(first)].tolist() == first
    assert (np.array(first) >= 0).any()
    count = len(tokenizers[1](text, add_special_tokens=False)["input_ids"])
    assert found[len(first)] == count  # the second answer begins where the second answer begins


def test_a_character_of_several_tokens_is_aligned_where_it_is_whole():
    """Tokens 1 to 3 are the bytes of one character; 3 is the one before which nothing whole is missing."""
    assert align_positions(np.array([0, 2, 3, 3, 3]), np.array([0, 1, 2, 3])).tolist() == [0, 2, -1, -1, 3]


@pytest.mark.parametrize("mean", ("position", "sample"))
def test_with_one_tokenizer_it_is_the_plain_loss(mean):
    generator = torch.Generator().manual_seed(0)
    hidden, head, theirs, their_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 5), (11, 5), (7, 6), (11, 6))
    )
    targets = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    on_image = torch.tensor([1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, 4, 5, -100], [-100, 6, 7, -100]])
    through = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    objective = Objective(normalize_by=mean, align_weight=0.7, vsd_weight=0.3)
    weights = objective.weights(labels)
    signal, ids = HiddenSignal(theirs, their_head), torch.arange(11)
    results = []
    for mapped in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, head, through)]
        if mapped:
            loss = loss_over_vocabularies(
                objective, VocabMap(ids, ids, 11, 11), leaves[0], LMHead(leaves[1]), targets, signal, torch.arange(7),
                SwitchStates(leaves[2], LMHead(their_head), on_image), weights, teacher_weights(labels, labels, weights),
                chunk_positions=3,
            )  # fmt: skip
        else:
            switch = SwitchStates(leaves[2], LMHead(their_head), on_image)
            loss = objective.fused(leaves[0], LMHead(leaves[1]), targets, signal, switch, weights)
        results.append([*loss.terms, *torch.autograd.grad(loss.total, leaves)])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


def test_align_and_ce_of_two_vocabularies_by_a_loop():
    """Position by position, entry by entry; only positions with a partner count in Align."""
    generator = torch.Generator().manual_seed(1)
    hidden, head, theirs, their_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (9, 5), (3, 6), (7, 6))
    )
    vocabularies = VocabMap(torch.tensor([0, 2, 5]), torch.tensor([1, 0, 6]), 8, 7)
    partner, targets = torch.tensor([0, -1, 2, -1]), torch.tensor([1, 2, 3, 8])
    objective = Objective("rkl", switch=False)
    found = loss_over_vocabularies(
        objective, vocabularies, hidden, LMHead(head), targets, HiddenSignal(theirs, their_head), partner
    )
    align = 0.0
    for i, j in ((0, 0), (2, 2)):
        p, q = (head @ hidden[i])[:8].softmax(0), (their_head @ theirs[j]).softmax(0)
        ours = [p[0], p[2], p[5], sum(p[k] for k in (1, 3, 4, 6, 7))]
        teachers = [q[1], q[0], q[6], sum(q[k] for k in (2, 3, 4, 5))]
        align += sum(a * (a.log() - b.log()) for a, b in zip(ours, teachers, strict=True))
    torch.testing.assert_close(found.terms.align, align)
    ce = -sum((head @ hidden[i]).log_softmax(0)[targets[i]] for i in range(4))
    torch.testing.assert_close(found.terms.ce, ce)


@pytest.mark.parametrize("block_logits", (1, 18))
def test_chunks_and_blocks_change_nothing_and_a_chunk_makes_its_teacher_logits_once(monkeypatch, block_logits):
    generator = torch.Generator().manual_seed(2)
    hidden, head, theirs, their_head, switch = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((7, 5), (9, 5), (6, 4), (8, 4), (4, 4))
    )
    teacher = HiddenSignal(theirs.detach(), their_head.detach())
    sizes = []
    of_part = HiddenSignal.slice_rows
    monkeypatch.setattr(
        HiddenSignal, "slice_rows", lambda self, rows: sizes.append(self.positions) or of_part(self, rows)
    )

    def gradients(**chunks):
        loss = loss_over_vocabularies(
            Objective(), VocabMap(torch.tensor([0, 2, 5]), torch.tensor([1, 0, 6]), 9, 8), hidden, LMHead(head),
            torch.arange(7), teacher, torch.tensor([0, -1, 2, -1, -1, 3, 5]),
            SwitchStates(switch, LMHead(their_head.detach()), torch.tensor([1, 0, 1, 1, 0, 1]).bool()), **chunks,
        )  # fmt: skip
        return torch.autograd.grad(loss.total, (hidden, head, switch))

    whole = gradients()
    sizes.clear()
    monkeypatch.setattr("switchkd.losses.fused.BLOCK_LOGITS", {"cpu": block_logits})
    for one, other in zip(gradients(chunk_positions=4), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert sizes == [2, 2, 4]  # partners in two chunks of the student's positions; the switch pathway's chunk


def test_no_position_has_a_partner():
    hidden, head = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    vocabularies = VocabMap(torch.arange(2), torch.arange(2), 5, 5)
    loss = loss_over_vocabularies(
        Objective(switch=False), vocabularies, hidden, LMHead(head), torch.tensor([0, 1]),
        DenseSignal(torch.randn(1, 5)), torch.tensor([-1, -1]),
    )  # fmt: skip
    assert loss.terms.align == 0
    assert torch.autograd.grad(loss.total, hidden)[0].isfinite().all()


def test_weights_give_each_sample_what_it_has_by_the_students_positions():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, 4, -100, -100]])
    teacher = torch.tensor([[-100, 1, -100], [-100, 4, 5]])
    assert teacher_weights(labels, teacher, None).tolist() == [3, 0.5, 0.5]
    assert teacher_weights(labels, teacher, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1])).tolist() == [1, 0.5, 0.5]


@pytest.fixture(scope="module")
def place(tokenizers, tmp_path_factory):
    """A teacher and a student with two tokenizers, data, held-out data, and the teacher's store."""
    folder = tmp_path_factory.mktemp("vocab")
    models = {}
    for name, tokenizer, seed, width in (("student", tokenizers[0], 1, 16), ("teacher", tokenizers[1], 0, 32)):
        models[name] = tiny.checkpoint(folder / name, seed, width=width, rows=320, words_of=tokenizer)
    every = tiny.rows(20, text_only=(3,), two_turns=(5, 17))
    tiny.data(folder, every)
    (folder / "data.json").write_text(json.dumps(every[:14]))
    (folder / "held_out.json").write_text(json.dumps(every[14:]))
    common = {"teacher": models["teacher"], "data": folder / "data.json", "images": folder / "images"}
    cache_teacher(CacheOptions(out=folder / "s.zarr", template="qa", payload="both", hidden_dtype="float16", **common))
    return TrainOptions(
        student=models["student"],
        teacher=models["teacher"],
        data=folder / "data.json",
        images=folder / "images",
        cache=folder / "s.zarr",
        output=folder / "run",
        vocab_map=True,
        steps=30,
        batch_size=7,
        lr=3e-3,
        vsd_weight=10.0,
        log_every=10,
    )


def losses_on_held_out(place, student, output):
    """What one step over all held-out samples finds before it changes anything."""
    settings = {"student": student, "output": output, "steps": 1, "batch_size": 6, "log_every": 1, "lr": 1e-12}
    live = {"cache": None, "teacher_mode": "live", "template": "qa", "data": place.data.with_name("held_out.json")}
    return train(replace(place, **settings, **live)).losses


def test_training_lowers_align_and_vsd_on_held_out_samples(place, tmp_path, caplog):
    before = losses_on_held_out(place, place.student, tmp_path / "before")
    with caplog.at_level(logging.INFO, "switchkd"):
        train(replace(place, output=tmp_path / "run"))
    assert "entries shared" in caplog.text and "% of the student's have a partner" in caplog.text
    after = losses_on_held_out(place, tmp_path / "run", tmp_path / "after")
    print(before, after)
    assert after["loss_align"] < 0.8 * before["loss_align"]
    assert after["loss_vsd"] < 0.9 * before["loss_vsd"]


def test_cached_equals_live(place, tmp_path):
    short = replace(place, steps=2, log_every=1, lr=1e-3)
    cached = train(replace(short, output=tmp_path / "a"))
    live = train(replace(short, output=tmp_path / "b", cache=None, teacher_mode="live", template="qa"))
    assert cached.losses == pytest.approx(live.losses, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ("ddp", "fsdp"))
def test_two_processes_equal_one(place, tmp_path, profile):
    options = replace(place, output=tmp_path / "run", steps=3, batch_size=4, log_every=1)
    train(options)
    changed = {"steps": 3, "batch_size": 1, "accumulation": 2, "lr": options.lr, "vsd_weight": options.vsd_weight}
    done = two_processes(options, tmp_path, vocab_map=True, profile=profile, **changed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(options.output, tmp_path / "two")


@pytest.mark.parametrize("mode", ("cached", "live"))
def test_samples_that_share_rows_change_nothing(place, tmp_path, mode):
    """Both models lay out their own tokens."""
    plain = replace(place, steps=3, log_every=1, lr=1e-3, mean="sample", output=tmp_path / "plain")
    if mode == "live":
        plain = replace(plain, cache=None, teacher_mode="live", template="qa")
    train(plain)
    packed = replace(plain, packing=60, output=tmp_path / "packed")
    train(packed)
    assert_equal_runs(plain.output, packed.output)


def test_refusals(place, tmp_path):
    run = replace(place, output=tmp_path / "run")
    with pytest.raises(CheckpointError, match="tokenizers differ .* or pass --vocab-map"):
        train(replace(run, vocab_map=False))
    with pytest.raises(ConfigError, match="needs the teacher's whole rows"):
        train(replace(run, payload="topk"))
    with pytest.raises(ConfigError, match="pass --teacher"):
        train(replace(run, objective="sft", switch=False, template="qa"))
