"""Rows of logits of many shapes, and what must be true of the leading entries found in them."""

import torch

SPECTRA = {
    "normal": lambda z: z * 5,
    "ties": lambda z: (z * 3).round(),
    "one outlier": lambda z: torch.cat([z, torch.full_like(z[:, :1], 1e4)], -1),
    "a long tail": lambda z: -14 * torch.rand(z.shape, generator=torch.Generator().manual_seed(3)).pow(0.08) + z / 50,
    "all equal": torch.zeros_like,
    "two values": lambda z: (z > 1).to(z.dtype),
    "both zeros": lambda z: torch.where(z > 0, 0.0, -0.0).to(z.dtype),
    "far from zero": lambda z: z + 1000,
    "tiny": lambda z: z * 1e-30,
}


def assert_leads(found, logits):
    """The same k, and up to it the ids of a stable sort."""
    ids, k = found
    assert ids.shape[-1] == int(k.max())
    expected = logits.sort(dim=-1, descending=True, stable=True).indices
    for row, count in enumerate(k.tolist()):
        assert ids[row, :count].tolist() == expected[row, :count].tolist()
