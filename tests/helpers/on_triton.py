"""Where tests of Triton's kernels run: on a GPU, or in its interpreter (`make test-triton`)."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MARKS = [
    pytest.mark.triton,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device, or `make test-triton`"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
