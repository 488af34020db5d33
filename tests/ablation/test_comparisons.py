"""Paired comparisons: measures and tests against formulas written out, intervals against cases that are known."""

import json
import math

import numpy as np
import pytest

from switchkd.errors import ConfigError
from switchkd.pipelines.ablation.comparisons import compare, macro, markdown, read_answers, weights_of

pytest.importorskip("scipy", reason="comparisons are computed by scipy: extra `evidence`")
pytest.importorskip("statsmodels", reason="Holm's correction is statsmodels': extra `evidence`")


def answers(rng, share, kinds=(("style/a", 40), ("style/b", 10), ("combo/c", 25))):
    return {kind: {str(n): float(rng.random() < share) for n in range(count)} for kind, count in kinds}


def by_hand(found):
    """The mean over groups of the mean over kinds, loop by loop."""
    groups = {}
    for kind, values in found.items():
        share = sum(values.values()) / len(values)
        groups.setdefault(kind.split("/")[0] if "/" in kind else None, []).append(share)
    return sum(sum(shares) / len(shares) for shares in groups.values()) / len(groups)


def test_the_macro_average_is_the_loop():
    found = answers(np.random.default_rng(0), 0.4)
    assert macro(found) == pytest.approx(by_hand(found))
    plain = {"a": {"0": 1.0}, "b": {"0": 0.0, "1": 0.0}}
    assert macro(plain) == pytest.approx(by_hand(plain)) == 0.5
    assert sum(weights_of(found).values()) == pytest.approx(1)
    assert set(weights_of({"color": 0, "shape": 0, "yes/no": 0}).values()) == {1 / 3}
    assert weights_of({"style/a": 0, "style/b": 0, "combo/c": 0})["combo/c"] == 0.5


def test_a_t_test_over_seeds_and_holms_steps():
    rng = np.random.default_rng(1)
    arms = {
        name: {seed: answers(rng, share) for seed in range(5)} for name, share in (("a", 0.7), ("b", 0.5), ("c", 0.45))
    }
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    found = compare(arms, pairs)
    for one in found:
        gains = [by_hand(arms[one.arm][seed]) - by_hand(arms[one.other][seed]) for seed in range(5)]
        assert one.by_seed == pytest.approx(gains)
        mean = sum(gains) / 5
        error = math.sqrt(sum((g - mean) ** 2 for g in gains) / 4 / 5)
        half = 2.7764451 * error  # the t distribution's 97.5 % point with 4 degrees of freedom
        assert one.over_seeds == pytest.approx((mean - half, mean + half))
        assert (one.p < 0.05) == (abs(mean) > half)
    ordered = sorted(found, key=lambda one: one.p)
    largest = 0.0
    for step, one in enumerate(ordered):
        largest = max(largest, min(1.0, (3 - step) * one.p))
        assert one.adjusted_p == pytest.approx(largest)


def test_the_bootstrap_has_the_width_of_the_normal_approximation():
    """Over questions: the variance of a weighted sum of means, with weights of kinds."""
    rng = np.random.default_rng(2)
    arms = {
        name: {0: answers(rng, share, (("style/a", 400), ("combo/c", 300)))} for name, share in (("a", 0.6), ("b", 0.5))
    }
    (found,) = compare(arms, [("a", "b")])
    assert (found.p, found.adjusted_p, found.over_seeds) == (None, None, None)  # one seed
    variance = 0.0
    for kind, values in arms["a"][0].items():
        gain = np.array([values[name] - arms["b"][0][kind][name] for name in values])
        variance += 0.25 * gain.var() / len(gain)
    low, high = found.over_questions
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.06)
    assert (high + low) / 2 == pytest.approx(found.mean, abs=0.005)
    assert compare(arms, [("a", "b")]) == [found]  # the same draws


def test_equal_arms_and_a_single_question_do_not_fail():
    same = {seed: {"a": {"0": 1.0}, "b": {"0": 0.0, "1": 1.0}} for seed in (0, 1)}
    (found,) = compare({"x": same, "y": same}, [("x", "y")])
    assert (found.mean, found.p, found.over_questions) == (0.0, None, (0.0, 0.0))
    assert "| x - y | +0.00 | +0.00, +0.00 | – | – | – | +0.00 … +0.00 | 3 |" in markdown(
        {"x": same, "y": same}, [found]
    )


def test_other_questions_and_other_seeds_are_refused():
    one, other = {0: {"a": {"0": 1.0}}}, {0: {"a": {"1": 1.0}}}
    with pytest.raises(ValueError, match="answered different questions"):
        compare({"x": one, "y": other}, [("x", "y")])
    with pytest.raises(ConfigError, match="no seed in common"):
        compare({"x": one, "y": {1: one[0]}}, [("x", "y")])


def test_rotations_of_a_question_are_one(tmp_path):
    rows = [{"unit": "u"}, {"unit": "u"}, {"unit": "v"}, {}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    lines = [
        {"row": row, "turn": 0, "question_type": "choice" if row < 3 else "", "correct": right}
        for row, right in enumerate((True, False, True, True))
    ] + [{"row": 3, "turn": 1, "question_type": "", "skipped": "too_long"}]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_answers(tmp_path / "predictions.jsonl", tmp_path / "data.json")
    assert found == {"choice": {"u": 0.0, "v": 1.0}, "other": {"3/0": 1.0}}
