"""What both ways of selecting entries from rows, torch's operators and Triton's kernels, take for given."""

from torch import Tensor

# Bins are computed in the logits' dtype: their edges are exact to 1e-6 of the row's spread even in float32.
EDGE_ERROR = 1e-6


def require_two(entries: Tensor) -> None:
    """Raise ValueError, naming the first position, where fewer than two columns are not masked; entries: [T, 1]."""
    if len(few := (entries < 2).flatten().nonzero()):
        raise ValueError(
            f"a knee needs at least 2 logits a row, all but {int(entries[few[0]])} of position {int(few[0])} are -inf"
        )
