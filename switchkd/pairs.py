"""KL divergence between two softmaxes over all ordered pairs of a list, in linear time (paper, eqs. 12-15).

DBiLD compares p = softmax(flatten(u_m - u_n : m < n)) with q, the same of v. There are k(k-1)/2 pairs, 3 million at the knee
of a 49k vocabulary, but e^{u_m - u_n} = e^{u_m} e^{-u_n} factorises, so prefix and suffix sums carry everything:

    Z(u)   = Σ_m e^{u_m} R_m,    R_m = Σ_{n>m} e^{-u_n},    P_n = Σ_{m<n} e^{u_m}
    first  = e^{u_m} R_m / Z     chance that m is the first of a pair drawn from p
    second = e^{-u_m} P_m / Z    chance that m is the second
    KL(p‖q) = Σ_m (first_m - second_m)(u_m - v_m) - log Z(u) + log Z(v)

Value and gradient are exact and cost O(k) time and memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this the largest pair has been scaled down so far that other terms may have left float32's normal range
# (1.2e-38); such rows, whose values rise against the leader's order, are computed again in log space.
SMALLEST_SAFE_Z = 1e-30


def pair_kl(u: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """KL(p_u ‖ p_v) per row, where p is the softmax over the differences x_m - x_n of all pairs m < n.

    Args:
        u, v: [T, K], same floating dtype (float32 or float64), already divided by the temperature. Order matters: the leader's
            descending order. Gradients reach both.
        keep: [T, K] bool, True for the first k entries of each row, k ≥ 2; the rest is ignored.

    Returns:
        [T], nats, the dtype of u. Differentiable once.
    """
    value: Tensor = _PairKL.apply(u, v, keep)  # type: ignore[no-untyped-call]
    return value


_Sums = dict[str, Tensor]
_Weighted = Callable[[Tensor, Tensor, Tensor, _Sums], tuple[Tensor, Tensor]]


class _PairKL(torch.autograd.Function):
    """The gradient is known in closed form with the value, so the forward pass keeps it and nothing else."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        plain_u, plain_v = _plain_sums(u, keep), _plain_sums(v, keep)
        value, grad_u, grad_v = _kl_and_gradients(u, v, keep, plain_u, plain_v, _plain_weighted, ctx.needs_input_grad)
        unsafe = torch.minimum(plain_u["z"], plain_v["z"]) < SMALLEST_SAFE_Z
        if unsafe.any():
            u, v, keep = u[unsafe], v[unsafe], keep[unsafe]
            sums = _log_sums(u, keep), _log_sums(v, keep)
            exact, exact_u, exact_v = _kl_and_gradients(u, v, keep, *sums, _log_weighted, ctx.needs_input_grad)
            value[unsafe] = exact
            for plain, better in ((grad_u, exact_u), (grad_v, exact_v)):
                if plain is not None and better is not None:
                    plain[unsafe] = better
        ctx.save_for_backward(grad_u, grad_v)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        grad_u, grad_v = ctx.saved_tensors
        scale = grad_value.unsqueeze(-1)
        return (None if grad_u is None else scale * grad_u, None if grad_v is None else scale * grad_v, None)


def _kl_and_gradients(
    u: Tensor,
    v: Tensor,
    keep: Tensor,
    sums_u: _Sums,
    sums_v: _Sums,
    weighted: _Weighted,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value [T] and, where asked for, dKL/du and dKL/dv [T, K], from the sums of either arithmetic below."""
    net_u = sums_u["first"] - sums_u["second"]
    gap = torch.where(keep, u - v, 0)  # c_m; only differences of c count, so its mean may go for the sake of float32
    gap = torch.where(keep, gap - gap.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True), 0)
    mean_gap = (net_u * gap).sum(-1)  # E_p[c_m - c_n]
    value = mean_gap - sums_u["log_z"] + sums_v["log_z"]
    grad_u = grad_v = None
    if needs_grad[0]:
        # Σ over pairs that hold m of ± p (c_m - c_n - E_p[c_m - c_n])
        later, earlier = weighted(u, keep, gap, sums_u)
        grad_u = (gap - mean_gap.unsqueeze(-1)) * sums_u["first"] - later
        grad_u += (gap + mean_gap.unsqueeze(-1)) * sums_u["second"] - earlier
    if needs_grad[1]:
        grad_v = (sums_v["first"] - sums_v["second"]) - net_u
    return value, grad_u, grad_v


def _suffix(x: Tensor) -> Tensor:
    """Exclusive suffix sum along the last dimension; a total minus a prefix would cancel."""
    summed = x.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(summed[:, 1:], (0, 1))


def _prefix(x: Tensor) -> Tensor:
    """Exclusive prefix sum along the last dimension."""
    return torch.nn.functional.pad(x.cumsum(-1)[:, :-1], (1, 0))


def _plain_sums(u: Tensor, keep: Tensor) -> _Sums:
    """Sums with max u taken out of e^u and min u out of e^{-u}: no overflow, fast."""
    top = u.masked_fill(~keep, -torch.inf).amax(-1, keepdim=True)
    low = u.masked_fill(~keep, torch.inf).amin(-1, keepdim=True)
    rise = (u - top).masked_fill_(~keep, -torch.inf).exp_()  # e^{u_m - max}
    fall = (low - u).masked_fill_(~keep, -torch.inf).exp_()  # e^{min - u_m}
    first, second = rise * _suffix(fall), fall * _prefix(rise)
    z = first.sum(-1)
    norm = z.unsqueeze(-1)
    log_z = z.log() + (top - low).squeeze(-1)
    return {"first": first / norm, "second": second / norm, "z": z, "log_z": log_z, "rise": rise, "fall": fall}


def _plain_weighted(u: Tensor, keep: Tensor, gap: Tensor, sums: _Sums) -> tuple[Tensor, Tensor]:
    """Σ_{n>m} p_mn c_n and Σ_{n<m} p_nm c_n, both [T, K]."""
    norm = sums["z"].unsqueeze(-1)
    later = sums["rise"] * _suffix(sums["fall"] * gap) / norm
    earlier = sums["fall"] * _prefix(sums["rise"] * gap) / norm
    return later, earlier


def _log_suffix(x: Tensor) -> Tensor:
    """`_suffix` of e^x, in log space."""
    summed = x.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.nn.functional.pad(summed[:, 1:], (0, 1), value=-torch.inf)


def _log_prefix(x: Tensor) -> Tensor:
    """`_prefix` of e^x, in log space."""
    return torch.nn.functional.pad(x.logcumsumexp(-1)[:, :-1], (1, 0), value=-torch.inf)


def _log_sums(u: Tensor, keep: Tensor) -> _Sums:
    """`_plain_sums` in log space: any finite u, at about three times the cost."""
    up, down = u.masked_fill(~keep, -torch.inf), (-u).masked_fill(~keep, -torch.inf)
    log_first, log_second = up + _log_suffix(down), down + _log_prefix(up)
    log_z = log_first.logsumexp(-1)
    norm = log_z.unsqueeze(-1)
    return {"first": (log_first - norm).exp(), "second": (log_second - norm).exp(), "log_z": log_z}


def _log_weighted(u: Tensor, keep: Tensor, gap: Tensor, sums: _Sums) -> tuple[Tensor, Tensor]:
    """`_plain_weighted` in log space; positive and negative weights are summed apart."""
    up, down = u.masked_fill(~keep, -torch.inf), (-u).masked_fill(~keep, -torch.inf)
    norm = sums["log_z"].unsqueeze(-1)
    later = earlier = torch.zeros_like(u)
    for sign in (1, -1):
        log_gap = (sign * gap).clamp_min(0).log()
        later = later + sign * (up + _log_suffix(down + log_gap) - norm).exp()
        earlier = earlier + sign * (down + _log_prefix(up + log_gap) - norm).exp()
    return later, earlier
