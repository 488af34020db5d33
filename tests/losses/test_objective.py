"""The objective: names, weights, rows in use, contradictions."""

import pytest
import torch
import torch.nn.functional as F

from switchkd.errors import ConfigError
from switchkd.losses import dbild_loss, kl_loss
from switchkd.losses.baselines import BASELINES
from switchkd.losses.objective import OBJECTIVES, LossTerms, Objective
from switchkd.losses.signals import DenseSignal
from switchkd.positions import targets

P, N, V = 4, 9, 12


def normal(seed, columns):
    return torch.randn(P, columns, generator=torch.Generator().manual_seed(seed))


def parts(objective, switch=None):
    return objective.terms(
        normal(1, V),
        torch.tensor([0, 3, 8, 2]),
        DenseSignal(normal(2, N)),
        switch,
        torch.tensor([True, True, False, True]),
    )


def test_the_names_are_those_of_the_paper():
    names = ["sft", "fkl", "rkl", "bild-fkl", "bild-rkl", "dbild-fkl", "dbild-rkl", "switch-ce", *BASELINES]
    assert list(OBJECTIVES) == names


@pytest.mark.parametrize("name", [name for name, loss in OBJECTIVES.items() if loss is not None])
def test_each_objective_has_ce_and_align(name):
    found = parts(Objective(name, switch=False))
    torch.testing.assert_close(found.ce, F.cross_entropy(normal(1, V), torch.tensor([0, 3, 8, 2]), reduction="sum"))
    assert found.align > 0
    assert found.vsd is None


def test_distillation_runs_over_the_rows_in_use():
    found = parts(Objective("dbild-rkl", switch=False))
    torch.testing.assert_close(found.align, dbild_loss(normal(1, V)[:, :N], normal(2, N), reduction="sum"))


def test_vsd_compares_image_positions_only():
    switch = normal(3, V)[:3]
    found = parts(Objective(), switch)
    expected = dbild_loss(switch[:, :N], normal(2, N)[[0, 1, 3]], reduction="sum")
    torch.testing.assert_close(found.vsd, expected)


def test_temperatures_default_to_the_papers():
    plain = parts(Objective("fkl", switch=False)).align
    torch.testing.assert_close(plain, kl_loss(normal(1, V)[:, :N], normal(2, N), reduction="sum"))
    warm = parts(Objective("dbild-rkl", switch=False, temperature=3.0)).align
    torch.testing.assert_close(warm, parts(Objective("dbild-rkl", switch=False)).align)


def test_the_total_weighs_the_parts():
    one = torch.tensor(1.0)
    objective = Objective(align_weight=0.5, vsd_weight=2.0)
    assert objective.total(LossTerms(one, one, one)) == 3.5
    assert objective.total(LossTerms(one, None, None)) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sft"}, "sft has no teacher to switch to: pass --no-switch"),
        ({"name": "dbild"}, "no objective 'dbild'; there are sft, fkl"),
        ({"name": "switch-ce", "switch": False}, "switch-ce is a cross-entropy on the switch pathway"),
        ({"name": "switch-ce", "temperature": 2.0}, "switch-ce compares no logits"),
        ({"name": "fkl", "window": 8}, "window belongs to dbild-fkl and dbild-rkl"),
        ({"window": 1}, "at least 2 logits, got 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"normalize_by": "token"}, "mean is one over positions or over samples, got 'token'"),
    ],
)
def test_contradictions_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**options)


def labels_of(*counts):
    """Labels of samples with so many positions each."""
    width = max(counts) + 1
    return torch.tensor([[-100, *range(n), *[-100] * (width - 1 - n)] for n in counts])


def test_the_mean_over_samples_is_a_loop_over_samples():
    labels, switch = labels_of(3, 1), normal(3, V)[:3]
    objective = Objective("rkl", normalize_by="sample")
    logits = normal(1, V).requires_grad_()
    on_image = torch.tensor([True, True, True, False])
    found = objective.terms(
        logits, targets(labels), DenseSignal(normal(2, N)), switch, on_image, objective.weights(labels)
    )
    expected = {"ce": 0.0, "align": 0.0, "vsd": 0.0}
    again = normal(1, V).requires_grad_()
    for of_sample in (slice(0, 3), slice(3, 4)):
        teacher = normal(2, N)[of_sample]
        expected["ce"] += F.cross_entropy(again[of_sample], targets(labels)[of_sample])
        expected["align"] += kl_loss(again[of_sample, :N], teacher, direction="reverse")
        if of_sample.stop <= len(switch):
            expected["vsd"] += kl_loss(switch[of_sample, :N], teacher, direction="reverse")
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value)
    objective.total(found).backward()
    sum(expected.values()).backward()
    torch.testing.assert_close(logits.grad, again.grad)
    assert objective.count(labels) == 2
    assert Objective("rkl").count(labels) == 4
    assert Objective("rkl").weights(labels) is None
