"""On a GPU as on the CPU: selection, losses, capture, training, the estimate of memory. `make test-gpu`; skipped without CUDA."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import training
from loss_cases import Case, objective
from spectra import SPECTRA, assert_leads
from training import history

from switchkd.losses import LMHead, dbild_loss, fused_dbild
from switchkd.losses.selection import leading_entries, top_of_rows
from switchkd.losses.signals import DenseSignal, HiddenSignal
from switchkd.models.block_attention import attend_in_blocks
from switchkd.models.varlen_attention import attend_varlen, check_kernel
from switchkd.pipelines.capture.audit import audit
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import AuditOptions, CacheOptions
from switchkd.pipelines.training.step_ways.fp8_teacher import check_fp8
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run by `make test-gpu`"),
]
cached, hidden, options = training.cached, training.hidden, training.options


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("positions", "rows"), [(1, 2), (5, 3000), (3, 151_936)])
def test_selection_is_that_of_a_stable_sort(positions, rows, spectrum, dtype):
    z = SPECTRA[spectrum](normal(positions, rows, dtype=torch.float64)).to(dtype)
    ids, k = leading_entries(z.cuda())
    assert torch.equal(k.cpu(), leading_entries(z)[1])
    assert_leads((ids.cpu(), k.cpu()), z)
    assert torch.equal(top_of_rows(z.cuda(), 2).cpu(), top_of_rows(z, 2))


def moved(case):
    fields = {name: x.detach().cuda() for name, x in vars(case).items() if x is not None}
    for name in ("hidden", "weight", "bias", "switch_hidden"):
        fields[name].requires_grad_()
    return replace(case, **fields)


@pytest.mark.parametrize("chunk", (1, 3, 100))
@pytest.mark.parametrize("name", ("fkl", "rkl", "bild-rkl", "dbild-fkl", "dbild-rkl"))
def test_the_fused_objective_in_float64(name, chunk):
    here, there = Case.make(), moved(Case.make())
    wanted, found = (case.fused(objective(name), case.signal(), chunk) for case in (here, there))
    torch.testing.assert_close(found.total.cpu(), wanted.total, rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(loss.total / 11, case.inputs()) for loss, case in ((wanted, here), (found, there))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-10, atol=1e-12)


def test_dbild_of_a_whole_vocabulary_in_float32():
    student, teacher = normal(4, 151_936) * 3, normal(4, 151_936, seed=1) * 3
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        z = student.to(device, dtype).requires_grad_()
        loss = dbild_loss(z, DenseSignal(teacher.to(device, dtype)))
        results.append((loss.detach().cpu().double(), torch.autograd.grad(loss, z)[0].cpu().double()))
    (wanted, gradient), (found, other) = results
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert (other - gradient).norm() < 1e-4 * gradient.norm()


def test_a_compiled_loss():
    student, teacher = normal(5, 3000).cuda().requires_grad_(), DenseSignal(normal(5, 3000, seed=1).cuda())
    plain, compiled = (call(student, teacher) for call in (dbild_loss, torch.compile(dbild_loss, fullgraph=True)))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (compiled, plain)))


def test_the_fused_loss_holds_a_chunk_of_logits_and_no_more():
    width, vocabulary = 256, 151_936
    head, teacher_head = (normal(vocabulary, width, seed=seed).cuda() / 8 for seed in (1, 2))
    peaks = []
    for positions in (256, 4096):
        hidden = normal(positions, width, seed=3).cuda().requires_grad_()
        signal = HiddenSignal(normal(positions, width, seed=4).cuda(), teacher_head)
        targets = torch.arange(positions).cuda()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_dbild(hidden, LMHead(head), targets, signal).total.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - hidden.nbytes)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("payload", ("topk", "hidden"))
def test_a_store_captured_on_the_gpu(cached, teacher, payload, tmp_path):
    made = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.zarr"
        cache_teacher(
            CacheOptions(
                teacher=teacher, data=cached / "data.json", images=cached / "images", out=out, template="qa",
                part_size=5, payload=payload, k=6, device=device, fine=1 / 4096, coarse=1 / 4096,
            )
        )  # fmt: skip
        made[device] = TeacherStore(out).payload(range(12))
    here, there = made.values()
    np.testing.assert_allclose(there.stat("logsumexp"), here.stat("logsumexp"), atol=2 / 1024)
    if payload == "hidden":
        np.testing.assert_allclose(there.hidden, here.hidden, atol=2e-2)
    else:
        assert (there.ids == here.ids).mean() > 0.98  # neighbours may change places
        np.testing.assert_allclose(there.logits, here.logits, atol=2e-3)
    found = audit(AuditOptions(store=tmp_path / "cuda.zarr", teacher=teacher, data=cached / "data.json",
                               images=cached / "images", samples=8, device="cuda"))  # fmt: skip
    assert found.positions > 0


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_training_is_that_on_the_cpu(options, monkeypatch, precision):
    train(replace(options, precision=precision, steps=4))
    found = history(options.output)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(replace(options, precision=precision, steps=4, output=options.output.with_name("cpu")))
    wanted = history(options.output.with_name("cpu"))
    np.testing.assert_allclose(found, wanted, rtol=2e-4 if precision == "float32" else 3e-2)


def test_an_interrupted_run_goes_on_to_the_same_weights(options, monkeypatch):
    train(replace(options, output=options.output.with_name("whole")))
    with monkeypatch.context() as patch:
        training.interrupt_after(patch, 3)
        with pytest.raises(training.Stop):
            train(options)
    train(options)
    folders = [options.output, options.output.with_name("whole")]
    training.assert_same_weights(*map(training.weights, folders), rtol=1e-5, atol=1e-6)


FAR = {"rel": 0.25, "abs": 0.02}  # with a teacher of three bits of mantissa
NEAR = {"rel": 3e-2, "abs": 5e-3}  # losses of runs that round otherwise; a knee of one position moves


@pytest.mark.parametrize(
    "changed",
    [
        {"packing": 10_000, "experimental": "varlen-attention"},
        {"packing": 14, "experimental": "varlen-attention", "student_checkpointing": True, "teacher_checkpointing": True},
        {"experimental": "triton-selection"},
        {"experimental": "compile-layers"},
        {"experimental": "fp8-teacher", "teacher_checkpointing": True},
        {"precision": "bfloat16-copies"},
        {"precision": "bfloat16-copies", "packing": 10_000, "vsd_share": 0.5,
         "experimental": "varlen-attention,triton-selection,compile-layers"},
        {"precision": "bfloat16-copies", "packing": 10_000, "experimental": "fp8-teacher,compile-layers"},
    ],
    ids=("varlen", "varlen, checkpointed", "triton", "compiled", "fp8", "copies", "all", "fp8, compiled"),
)  # fmt: skip
def test_every_way_of_a_step_gives_the_run_of_the_usual_one(options, hidden, changed, monkeypatch):
    usual = replace(options, cache=hidden, precision="bfloat16", vsd_share=changed.get("vsd_share"))
    train(replace(usual, output=options.output.with_name("usual")))
    other = replace(usual, **changed)
    train(replace(other, output=options.output.with_name("whole")))
    found, wanted = (history(options.output.with_name(name)) for name in ("whole", "usual"))
    for mine, expected in zip(found, wanted, strict=True):
        assert mine == pytest.approx(expected, **(FAR if "fp8" in changed.get("experimental", "") else NEAR))
    with monkeypatch.context() as patch:
        training.interrupt_after(patch, 3)
        with pytest.raises(training.Stop):
            train(other)
    train(other)
    for mine, expected in zip(history(other.output), found, strict=True):
        assert mine == pytest.approx(expected, **NEAR)


def test_products_in_float8_are_their_references():
    check_fp8(torch.device("cuda"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_the_variable_length_kernel_is_attention_of_one_sample_at_a_time(dtype, kv_heads):
    check_kernel(torch.device("cuda"))
    samples = [[300, 1, 211], [512], [64] * 8]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in samples]).cuda()
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 4 // kv_heads
    shapes = [(3, heads, 512, 64) for heads in (4, kv_heads, kv_heads)]
    leaves = [normal(*shape, seed=seed).cuda().to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    results = []
    for attend in (attend_varlen, attend_in_blocks):
        found, _ = attend(module, *leaves, None, position_ids=position_ids, scaling=0.1)
        results.append([found, *torch.autograd.grad(found.float().square().sum(), leaves)])
    for mine, expected in zip(*results, strict=True):
        assert (mine.float() - expected.float()).norm() < 2e-2 * expected.float().norm()
