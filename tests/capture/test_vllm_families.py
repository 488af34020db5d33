"""Every family that vLLM has: its states equal those of transformers, however prompts are cut or cached. Run by `make test-vllm`.

Engines run inside this process, one after the other; the fixture `case` is the outer loop.
"""

from dataclasses import replace

import numpy as np
import pytest
import vllm_families

from switchkd.errors import RunError
from switchkd.pipelines.capture.failing_sample import capture_rows

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

HIDDEN, LOGITS = 1e-4, 2e-4  # differences from transformers in float32; logits are sums of 128 states, and up to 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return vllm_families.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=vllm_families.FAMILIES)
def case(request, tmp_path_factory, data):
    return vllm_families.open_case(request.param, tmp_path_factory.mktemp(request.param), data)


@pytest.fixture(scope="module")
def engine(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        backend = case.open_vllm()
        yield backend
        backend.engine.engine_core.shutdown()


def assert_same(found, expected):
    """Within the tolerances; ids equal except where neighbours are closer than twice the tolerance."""
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=HIDDEN, rtol=0)
    np.testing.assert_allclose(found.logits, expected.logits, atol=LOGITS, rtol=0)
    gaps = np.abs(np.diff(expected.logits, axis=1)) < 2 * LOGITS
    tied = np.pad(gaps, ((0, 0), (1, 0))) | np.pad(gaps, ((0, 0), (0, 1)), constant_values=True)
    assert (tied | (found.ids == expected.ids)).all()


def test_states_are_those_of_transformers(case, engine, monkeypatch):
    """Images of several sizes, text only, several turns; prompts are cut, inside images and answers."""
    pieces = vllm_families.watch_pieces(monkeypatch)
    for found, expected in zip(engine.capture(case.samples, case.worker.manifest), case.expected, strict=True):
        assert_same(found, expected)
    assert case.cuts_inside_images(pieces) >= 2, "no image was cut: the test tests nothing"
    assert any(begin < end < last for _, end, runs in pieces for begin, last in runs)


def test_a_cached_prefix_is_that_of_its_image(case, engine, monkeypatch):
    """The same samples again; two of them have the same ids, and other images."""
    one, other = (case.samples[index] for index in vllm_families.SAME_IDS)
    assert np.array_equal(one.input_ids, other.input_ids)
    first, second = (case.expected[index].hidden for index in vllm_families.SAME_IDS)
    assert np.abs(first - second).max() > 0.1
    engine.capture(case.samples, case.worker.manifest)
    pieces = vllm_families.watch_pieces(monkeypatch)
    cached = 0
    for index in (*vllm_families.SAME_IDS, *range(len(case.samples))):
        pieces.clear()
        (found,) = engine.capture([case.samples[index]], case.worker.manifest)
        assert_same(found, case.expected[index])
        cached += pieces[0][0] >= vllm_families.BLOCK  # the first rows that ran
    assert cached >= 10, "no prefix came from the cache"


def test_a_sample_whose_image_does_not_fit_is_named(case, engine):
    """The engine goes on with other samples."""
    index = 1
    good, manifest, path = case.samples[index], case.worker.manifest, case.worker.checkpoint.path
    kept = np.ones(len(good.input_ids), bool)
    kept[case.image_of(good)[0]] = False  # one image token less than there are features
    fewer = (good.image_tokens[0] - 1,)
    bad = replace(good, input_ids=good.input_ids[kept], supervised=good.supervised[kept], image_tokens=fewer)
    with pytest.raises(RunError, match="^row 41: vLLM fails: "):
        capture_rows(engine, manifest, path, [(40, case.samples[0]), (41, bad), (42, case.samples[2])])
    (found,) = engine.capture([good], manifest)
    assert_same(found, case.expected[index])
