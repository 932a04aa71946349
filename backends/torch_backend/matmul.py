"""Matrix products to float32's accuracy, whatever the user lets torch's own do."""

from typing import Any

import torch

__all__ = ["matmul", "may_round"]

Tensor = torch.Tensor

_MKLDNN: Any = torch.backends.mkldnn


def may_round(device: str) -> bool:
    """Whether torch may round the operands of a float32 product on that device type, to TF32 or to bfloat16.

    That is the user's setting, global to the process, so it is read and never changed.
    """
    if device not in ("cuda", "cpu"):
        return True
    try:
        setting: Any = torch.backends.cuda.matmul if device == "cuda" else _MKLDNN.matmul
        return setting.fp32_precision not in ("ieee", "none") or torch.get_float32_matmul_precision() != "highest"
    except (AttributeError, RuntimeError):  # a torch before 2.9, or settings through its older and newer names mixed
        return True


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """``matmul(x, w)`` to float32's accuracy, or within 1e-9 of it as NMSE.

    Where operands may be rounded, each is split into a bfloat16 part, which TF32 and bfloat16 hold exactly, and the
    rest; the product of the two rests is left out.
    """
    if x.dtype != torch.float32 or not may_round(x.device.type):
        return torch.matmul(x, w)
    (x_high, x_low), (w_high, w_low) = _split(x), _split(w)
    return torch.matmul(x_high, w_high) + (torch.matmul(x_high, w_low) + torch.matmul(x_low, w_high))


def _split(array: Tensor) -> tuple[Tensor, Tensor]:
    high = array.to(torch.bfloat16).to(torch.float32)
    high = torch.where(torch.isfinite(high), high, array)  # infinite, or rounded beyond the range
    return high, torch.where(torch.isfinite(array), array - high, 0)
