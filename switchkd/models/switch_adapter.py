"""A learned map from the student's vision features to the teacher's, for towers of another width or number of patches.

The paper's switch pathway feeds V_S(x) directly to the teacher's projector, so both towers need features of the same shape; the
paper leaves other shapes to future work (section 4.3.5). Here z_switch = L_T(P_T(A(V_S(x))), text), where A is trained with the
student and discarded after training: no exported student contains it.

Approximations: VSD then trains the student's tower *and* A, so A alone may account for some of the reduction of VSD; a resampled
grid differs from the features of a tower with the teacher's resolution.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("linear", "mlp")
Shape = tuple[int, int]  # (n, d): features per image, their width


class SwitchAdapter(nn.Module):
    """Maps [B, n_S, d_S] to [B, n_T, d_T].

    If n_S and n_T differ, the features are resampled bilinearly as a square grid, followed by a depthwise 3×3 convolution,
    initialised to zero, with a residual. A number one below a square is treated as a grid whose first patch was dropped.

    Args:
        kind: "linear", one layer with orthogonal initialisation; "mlp", two layers with GELU.
        student, teacher: (n, d) of each side.

    Raises:
        ValueError: the numbers of features differ and one of them is no square grid; an unknown kind.
    """

    def __init__(self, kind: str, student: Shape, teacher: Shape) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"a switch adapter is {' or '.join(KINDS)}, got {kind!r}")
        (count, width), (self.count, target_width) = student, teacher
        self.resamples = count != self.count
        if self.resamples:
            grid_side(count), grid_side(self.count)
            self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
            for parameter in self.local.parameters():
                nn.init.zeros_(parameter)
        first = nn.Linear(width, target_width)
        nn.init.orthogonal_(first.weight)
        nn.init.zeros_(first.bias)
        self.map = first if kind == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(target_width, target_width))

    def forward(self, features: Tensor) -> Tensor:
        """Map V_S(x) [B, n_S, d_S] to a replacement for V_T(x), [B, n_T, d_T]."""
        features = features.to(next(self.parameters()).dtype)
        if self.resamples:
            features = self._resample(features)
        mapped: Tensor = self.map(features)
        return mapped

    def _resample(self, features: Tensor) -> Tensor:
        side, target = grid_side(features.shape[1]), grid_side(self.count)
        if features.shape[1] < side * side:
            features = torch.cat([features[:, :1], features], dim=1)  # the dropped patch is replaced by its neighbour
        grid = features.mT.reshape(len(features), -1, side, side)  # [B, d_S, side, side]
        grid = F.interpolate(grid, (target, target), mode="bilinear", align_corners=False, antialias=target < side)
        tokens: Tensor = (grid + self.local(grid)).flatten(2).mT
        return tokens[:, target * target - self.count :]


class CutAdapters(nn.Module):
    """A map for each cut at which two towers of one family have other widths, token by token; other cuts pass unchanged.

    Args:
        kind: see `SwitchAdapter`. student, teacher: cut → width of each side.
    """

    def __init__(self, kind: str, student: Mapping[str, int], teacher: Mapping[str, int]) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(
            {
                _key(cut): SwitchAdapter(kind, (1, width), (1, teacher[cut]))
                for cut, width in student.items()
                if width != teacher[cut]
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map V_S(x) to a replacement for V_T(x), each [..., d]."""
        return {
            cut: self.maps[_key(cut)](value) if _key(cut) in self.maps else value for cut, value in features.items()
        }


def _key(cut: str) -> str:
    return cut.replace(".", "-")  # names of modules have no dots


def adapt(student: nn.Module, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return V_S(x) as inputs of the teacher's projector: mapped by the student's switch adapter if it has one."""
    adapter = getattr(student, "switch_adapter", None)
    if isinstance(adapter, CutAdapters):
        adapted: dict[str, Tensor] = adapter(features)
        return adapted
    return {cut: value if adapter is None else adapter(value) for cut, value in features.items()}


def grid_side(count: int) -> int:
    """Return the side of the square grid of `count` features, with or without its first patch.

    Raises:
        ValueError: `count` fits no square grid.
    """
    side = math.isqrt(count + 1)
    if side * side - count not in (0, 1):
        side = math.isqrt(count)
    if side * side - count not in (0, 1):
        raise ValueError(f"{count} features lie on no square grid, so they cannot be resampled")
    return side
