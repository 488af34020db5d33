"""LoRA through peft: equal to a loop written by hand, exact on resume, merged when it is saved, refused where it cannot train."""

from dataclasses import replace

import pytest
import training
from training import Stop, assert_same_weights, history, interrupt_after, weights

from switchkd.pipelines.training.train import train

peft = pytest.importorskip("peft", reason="--lora needs peft: extra `lora`")
cached, hidden, options = training.cached, training.hidden, training.options


def test_a_resumed_run_equals_an_undisturbed_one(options, monkeypatch, tmp_path):
    options = replace(options, lora=2, lora_dropout=0.1)
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stop):
            train(options)
    train(options)
    assert history(options.output) == history(whole.output)
    assert_same_weights(weights(options.output), weights(whole.output))
