"""The capture pooler against a stand-in for vLLM's metadata: any chunks give the rows of the whole prompt, in order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import ConfigError
from switchkd.pipelines.capture.backends.base import require_vllm
from switchkd.pipelines.capture.backends.packed_rows import pack
from switchkd.pipelines.capture.backends.vllm_backend import predicting_runs
from switchkd.pipelines.capture.backends.vllm_pooler import RowsPooler, request_options
from switchkd.positions import IGNORED, predicting_rows

WIDTH, ROWS, TOP_K = 8, 50, 5
HEAD = torch.randn(ROWS + 6, WIDTH, generator=torch.Generator().manual_seed(7))  # padded beyond the rows in use


def head(states):
    return states @ HEAD.T


class Request:
    """One request: its hidden states, the runs it wants, and what vLLM would keep for it between steps."""

    def __init__(self, length, runs, seed, top_k=TOP_K, keep_hidden=True):
        self.states = torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.runs, self.top_k, self.keep_hidden = runs, top_k, keep_hidden
        self.params = SimpleNamespace(extra_kwargs=request_options(runs, ROWS, top_k, keep_hidden))
        self.state = SimpleNamespace(hidden_states_cache=[])
        self.state.clean = self.state.hidden_states_cache.clear

    def expected(self):
        wanted = torch.cat([self.states[begin:end] for begin, end in self.runs])
        return pack(wanted, head, ROWS, self.top_k, self.keep_hidden)


def metadata(pieces):
    """As vLLM fills it for one step; a piece is (request, begin, end)."""
    ends = [end for _, _, end in pieces]
    cursor = SimpleNamespace(
        num_scheduled_tokens_cpu=torch.tensor([end - begin for _, begin, end in pieces]),
        seq_lens_cpu=torch.tensor(ends),
        get_finished_mask=lambda: [end == len(request.states) for request, _, end in pieces],
    )
    return SimpleNamespace(
        pooling_params=[request.params for request, _, _ in pieces],
        pooling_states=[request.state for request, _, _ in pieces],
        get_pooling_cursor=lambda: cursor,
    )


def by_keyword(pooler, states, about):
    return pooler(hidden_states=states, pooling_metadata=about)


def by_position(pooler, states, about):
    return pooler(states, about)


@pytest.fixture(params=(by_keyword, by_position))
def step(request):
    """One step of the engine, in the calling style of either model runner; its buffer is overwritten afterwards."""
    pooler = RowsPooler(head, TOP_K)

    def run(*pieces):
        buffer = torch.cat([request.states[begin:end] for request, begin, end in pieces])
        outputs = request.param(pooler, buffer, metadata(pieces))
        buffer.fill_(torch.nan)
        return outputs

    return run


@pytest.mark.parametrize("size", (1, 2, 3, 7, 16, 40))
@pytest.mark.parametrize("runs", ([(0, 1)], [(3, 9)], [(3, 9), (12, 13), (20, 40)], [(39, 40)]))
def test_any_chunks_give_the_rows_of_the_whole_prompt(step, size, runs):
    request = Request(40, runs, seed=0)
    for begin in range(0, 40, size):
        (output,) = step((request, begin, min(begin + size, 40)))
        assert (output is None) == (begin + size < 40)
    torch.testing.assert_close(output, request.expected())
    assert request.state.hidden_states_cache == []


def test_requests_of_one_step_do_not_mix(step):
    a, b = Request(10, [(4, 9)], seed=1), Request(30, [(2, 5), (25, 29)], seed=2)
    c = Request(6, [(1, 5)], seed=3, top_k=0)
    d = Request(6, [(1, 5)], seed=4, keep_hidden=False)
    outputs = step((a, 0, 10), (b, 0, 12), (c, 0, 6), (d, 0, 6))
    assert outputs[1] is None
    for output, request in zip((outputs[0], *outputs[2:]), (a, c, d), strict=True):
        torch.testing.assert_close(output, request.expected())
    torch.testing.assert_close(step((b, 12, 30))[0], b.expected())


def test_a_preempted_request_begins_again(step):
    request = Request(30, [(2, 6), (10, 29)], seed=5)
    step((request, 0, 12))
    step((request, 12, 20))
    for begin, end in ((0, 5), (5, 16), (16, 30)):
        (output,) = step((request, begin, end))
    torch.testing.assert_close(output, request.expected())


def test_a_cached_prefix_that_reaches_into_the_answer_leaves_rows_out(step):
    request = Request(30, [(10, 20), (25, 29)], seed=6)
    (output,) = step((request, 16, 30))
    torch.testing.assert_close(output, request.expected()[6:])
    (output,) = step((request, 29, 30))
    assert len(output) == 0


def test_trial_runs_of_the_engine_pack_every_row():
    pooler = RowsPooler(head, TOP_K)
    request = Request(9, [], seed=7)
    request.params.extra_kwargs = None
    (output,) = pooler(request.states, metadata([(request, 0, 9)]))
    torch.testing.assert_close(output, pack(request.states, head, None, TOP_K, True))


def test_a_rank_without_logits_answers_with_as_many_rows():
    request = Request(9, [(2, 8)], seed=8)
    (output,) = RowsPooler(lambda _: None, TOP_K)(request.states, metadata([(request, 0, 9)]))
    assert len(output) == 6


def test_runs_are_the_predicting_rows():
    random = np.random.default_rng(0)
    for _ in range(50):
        supervised = random.random(20) < random.random()
        labels = torch.where(torch.from_numpy(supervised), 1, IGNORED)[None]
        rows = [row for begin, end in predicting_runs(supervised) for row in range(begin, end)]
        assert rows == predicting_rows(labels)[0].nonzero().flatten().tolist()


def test_without_vllm_one_line_says_how_to_install_it(monkeypatch, teacher, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError):
        require_vllm()
    (tmp_path / "d.json").write_text("[]")
    words = ["cache-teacher", "--backend", "vllm", "--teacher", teacher, "--data", tmp_path / "d.json"]
    result = CliRunner().invoke(main, [*map(str, words), "--out", str(tmp_path / "s.zarr")])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert "pip install 'switchkd[vllm]'" in line
