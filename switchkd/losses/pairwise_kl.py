"""KL divergence between two softmaxes over all ordered pairs of a list, in linear time (paper, eqs. 12-15).

DBiLD compares p = softmax(flatten(u_m - u_n : m < n)) with q, the same of v. There are k(k-1)/2 pairs, 3 million at the knee
of a 49k vocabulary, but e^{u_m - u_n} = e^{u_m} e^{-u_n} factorises, so prefix and suffix sums are sufficient:

    Z(u)   = Σ_m e^{u_m} R_m,    R_m = Σ_{n>m} e^{-u_n},    P_n = Σ_{m<n} e^{u_m}
    first  = e^{u_m} R_m / Z     probability that m is the first of a pair drawn from p
    second = e^{-u_m} P_m / Z    probability that m is the second
    KL(p‖q) = Σ_m (first_m - second_m)(u_m - v_m) - log Z(u) + log Z(v)

Value and gradient are exact and cost O(k) time and memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this the largest pair has been scaled down so far that other terms may have left float32's normal range
# (1.2e-38). Such rows, where the other model's values increase along the leader's order, are recomputed in log space.
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
    value: Tensor = _pair_kl(u, v, keep, u.requires_grad, v.requires_grad)[0]
    return value


_Sums = dict[str, Tensor]
_Weighted = Callable[[Tensor, Tensor, Tensor, _Sums], tuple[Tensor, Tensor]]


# The gradient is computed in closed form with the value, so the forward pass saves nothing else. This is a custom torch operator:
# compiled and exported programs then contain a call to it, since its arithmetic depends on the values.
@torch.library.custom_op("switchkd::pair_kl", mutates_args=())
def _pair_kl(u: Tensor, v: Tensor, keep: Tensor, wants_u: bool, wants_v: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return (KL [T], dKL/du, dKL/dv [T, K]); a gradient that is not requested is empty."""
    wanted = wants_u, wants_v
    sums = _plain_sums(u, keep), _plain_sums(v, keep)
    value, *gradients = _kl_and_gradients(u, v, keep, *sums, _plain_weighted, wanted)
    unsafe = torch.minimum(sums[0]["z"], sums[1]["z"]) < SMALLEST_SAFE_Z
    if unsafe.any():
        u, v, keep = u[unsafe], v[unsafe], keep[unsafe]
        sums = _log_sums(u, keep), _log_sums(v, keep)
        value[unsafe], *better = _kl_and_gradients(u, v, keep, *sums, _log_weighted, wanted)
        for gradient, exact in zip(gradients, better, strict=True):
            if gradient is not None and exact is not None:
                gradient[unsafe] = exact
    of_u, of_v = (u.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return value, of_u, of_v


@_pair_kl.register_fake
def _(u: Tensor, v: Tensor, keep: Tensor, wants_u: bool, wants_v: bool) -> tuple[Tensor, Tensor, Tensor]:
    of_u, of_v = (torch.empty_like(x) if wanted else x.new_empty(0) for x, wanted in ((u, wants_u), (v, wants_v)))
    return u.new_empty(u.shape[0]), of_u, of_v


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _scale_gradients(ctx: Any, of_value: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    scale = of_value.unsqueeze(-1)
    saved = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    return (*(scale * gradient if wanted else None for gradient, wanted in saved), None, None, None)


_pair_kl.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _kl_and_gradients(
    u: Tensor,
    v: Tensor,
    keep: Tensor,
    sums_u: _Sums,
    sums_v: _Sums,
    weighted: _Weighted,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the value [T] and, if requested, dKL/du and dKL/dv [T, K], from plain or log-space sums (both below)."""
    net_u = sums_u["first"] - sums_u["second"]
    gap = torch.where(
        keep, u - v, 0
    )  # c_m; only differences of c matter, so its mean is subtracted for float32 precision
    gap = torch.where(keep, gap - gap.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True), 0)
    mean_gap = (net_u * gap).sum(-1)  # E_p[c_m - c_n]
    value = mean_gap - sums_u["log_z"] + sums_v["log_z"]
    grad_u = grad_v = None
    if needs_grad[0]:
        # Σ over pairs that contain m of ± p (c_m - c_n - E_p[c_m - c_n])
        later, earlier = weighted(u, keep, gap, sums_u)
        grad_u = (gap - mean_gap.unsqueeze(-1)) * sums_u["first"] - later
        grad_u += (gap + mean_gap.unsqueeze(-1)) * sums_u["second"] - earlier
    if needs_grad[1]:
        grad_v = (sums_v["first"] - sums_v["second"]) - net_u
    return value, grad_u, grad_v


def _suffix(x: Tensor) -> Tensor:
    """Exclusive suffix sum along the last dimension; subtracting a prefix from the total would lose precision by cancellation."""
    summed = x.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(summed[:, 1:], (0, 1))


def _prefix(x: Tensor) -> Tensor:
    """Exclusive prefix sum along the last dimension."""
    return torch.nn.functional.pad(x.cumsum(-1)[:, :-1], (1, 0))


def _plain_sums(u: Tensor, keep: Tensor) -> _Sums:
    """Sums with max u factored out of e^u and min u out of e^{-u}: no overflow, and fast."""
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
    """`_plain_weighted` in log space; positive and negative weights are summed separately."""
    up, down = u.masked_fill(~keep, -torch.inf), (-u).masked_fill(~keep, -torch.inf)
    norm = sums["log_z"].unsqueeze(-1)
    later = earlier = torch.zeros_like(u)
    for sign in (1, -1):
        log_gap = (sign * gap).clamp_min(0).log()
        later = later + sign * (up + _log_suffix(down + log_gap) - norm).exp()
        earlier = earlier + sign * (down + _log_prefix(up + log_gap) - norm).exp()
    return later, earlier
