"""The pooler of the capture model: converts each request's hidden states to the packed rows of its supervised positions.

It runs in vLLM's worker, on the device of the logits, and receives a request in chunks: chunked prefill may split a prompt anywhere
and a preempted request starts again. It is plain torch; vLLM's own base class is added in vllm_model.py.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.pipelines.capture.backends.packed_rows import pack

Runs = list[tuple[int, int]]  # [begin, end) of the rows wanted, ascending, in positions of the expanded prompt


def request_options(runs: Runs, vocab_rows: int | None, top_k: int, keep_hidden: bool) -> dict[str, Any]:
    """Return a request's parameters for the pooler, as plain data for `PoolingParams.extra_kwargs`."""
    return {"runs": runs, "vocab_rows": vocab_rows, "top_k": top_k, "keep_hidden": keep_hidden}


class RowsPooler(nn.Module):
    """Selects the requested rows of hidden states, collects them over a request's chunks, and packs them when it is complete.

    Args:
        compute_logits: [p, d] → [p, V] float32; None on a tensor-parallel rank that gets no logits.
        profile_top_k: K of the engine's profiling runs, whose requests name no rows.
    """

    def __init__(self, compute_logits: Callable[[Tensor], Tensor | None], profile_top_k: int) -> None:
        super().__init__()
        self._compute_logits = compute_logits
        self._profile_top_k = profile_top_k

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """Process one step's hidden states.

        Args:
            hidden_states: [rows of this step, d], request after request. pooling_metadata: vLLM's `PoolingMetadata`.

        Returns:
            One entry per request: packed rows (packed_rows.py) if this step completes it, else None. Fewer rows than requested
            mean that a prefix came from the cache, without hidden states.
        """
        cursor, states = pooling_metadata.get_pooling_cursor(), pooling_metadata.pooling_states
        counts, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        options = [
            params.extra_kwargs or request_options([(0, end)], None, self._profile_top_k, True)
            for params, end in zip(pooling_metadata.pooling_params, ends, strict=True)
        ]
        first = 0
        for wanted, state, count, end in zip(options, states, counts, ends, strict=True):
            _collect(state.hidden_states_cache, wanted["runs"], hidden_states[first : first + count], end - count)
            first += count
        alike: dict[tuple[int | None, int, bool], list[int]] = defaultdict(list)
        for index, finished in enumerate(cursor.get_finished_mask()):
            if finished:
                wanted = options[index]
                alike[wanted["vocab_rows"], wanted["top_k"], wanted["keep_hidden"]].append(index)
        outputs: list[Tensor | None] = [None] * len(counts)
        for how, members in alike.items():
            kept = [torch.cat([hidden_states[:0], *states[index].hidden_states_cache]) for index in members]
            packed = self._pack(torch.cat(kept), *how)
            for index, rows in zip(members, torch.split(packed, [len(rows) for rows in kept]), strict=True):
                outputs[index] = rows
                states[index].clean()
        return outputs

    def _pack(self, states: Tensor, vocab_rows: int | None, top_k: int, keep_hidden: bool) -> Tensor:
        if not len(states):
            return states.new_empty(0, 0, dtype=torch.float32)
        return pack(states, self._logits, vocab_rows, top_k, keep_hidden)

    def _logits(self, states: Tensor) -> Tensor:
        logits = self._compute_logits(states)
        # A rank without logits runs the same steps; its return value is not used.
        return (
            states.new_zeros(len(states), max(self._profile_top_k, 2), dtype=torch.float32)
            if logits is None
            else logits
        )


def _collect(held: list[Tensor], runs: Runs, rows: Tensor, begin: int) -> None:
    """Add the requested ones of `rows`, which are rows begin, begin + 1, … of the prompt, to those collected."""
    before = sum(max(min(run_end, begin) - run_begin, 0) for run_begin, run_end in runs)
    if sum(map(len, held)) > before:  # preempted: these rows of the prompt were processed before
        held[:] = [torch.cat(held)[:before]]
    for run_begin, run_end in runs:
        low, high = max(run_begin - begin, 0), min(run_end - begin, len(rows))
        if low < high:
            held.append(rows[low:high].clone())  # the engine overwrites its buffer in the next step
