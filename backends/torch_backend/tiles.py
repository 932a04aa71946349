"""The weight made dense one tile at a time, in plain torch operations: for every device but the CPU.

The seam for a tuned kernel: an implementation of ``quantcore::dot`` registered for a device of its own (see
:mod:`~quantcore_backends.torch_backend.ops`) takes the place of :func:`dot` there, and nothing else changes.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch

from quantcore import Scheme
from quantcore_backends.torch_backend.bitstream import pack, unpack
from quantcore_backends.torch_backend.matmul import matmul

__all__ = ["dequantize", "dot", "gather_dot", "quantize", "take"]

Tensor = torch.Tensor
Leaves = tuple[Tensor, Tensor, Tensor]

TILE: Final = 1 << 22
"""Elements that are dense at one time: 16 MiB in float32."""

_COLUMNS: Final = 8192


def quantize(w: Tensor, scheme: str) -> Leaves:
    """Encode along the last axis, by the rules of plugins.md: bit-equal to the reference where division is IEEE's."""
    chosen = Scheme.parse(scheme)
    *leading, in_features = w.shape
    groups = chosen.groups(in_features)
    group = chosen.group_size or in_features
    dense = w.to(torch.float32)
    missing = groups * group - in_features
    if missing:
        dense = torch.cat([dense, dense[..., -1:].expand(*leading, missing)], dim=-1)
    dense = dense.reshape(*leading, groups, group)
    low, high = dense.amin(dim=-1, keepdim=True), dense.amax(dim=-1, keepdim=True)
    scale, bias = _scale_and_bias(low, high, float((1 << chosen.bits) - 1))
    codes = ((dense - bias) / scale).round().clamp(0, (1 << chosen.bits) - 1).to(torch.int64)
    codes = codes.reshape(*leading, groups * group)[..., :in_features]
    return pack(codes, chosen.bits), scale[..., 0].to(w.dtype), bias[..., 0].to(w.dtype)


def _scale_and_bias(low: Tensor, high: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Scale and bias of groups from `low` to `high`: the edge of larger magnitude, and zero, become codes."""
    # clamp's bound is rounded to float32 first, as the reference's 1e-7 is
    scale = torch.clamp((high - low) / torch.full_like(low, top), min=torch.full_like(low, 1e-7))
    if top == 1:
        return scale, low  # one bit: the two ends
    from_low = low.abs() > high.abs()
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = (edge / scale).round()
    moved = steps != 0
    scale = torch.where(moved, edge / torch.where(moved, steps, 1), scale)
    return scale, torch.where(moved, edge, 0)


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, scheme: str, in_features: int, dtype: str) -> Tensor:
    """``code * scale + bias`` in float32, rounded once to `dtype`."""
    wanted = getattr(torch, dtype)
    dense = torch.empty((*packed.shape[:-1], in_features), dtype=wanted, device=packed.device)
    if dense.numel() == 0:
        return dense
    flat = dense.view(-1, in_features)
    leaves = tuple(leaf.reshape(-1, leaf.shape[-1]) for leaf in (packed, scales, biases))
    for rows in _slices(flat.shape[0], max(1, TILE // in_features)):
        flat[rows] = _tile(tuple(leaf[rows] for leaf in leaves), Scheme.parse(scheme), 0, in_features, torch.float32)
    return dense


def take(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    indices: Tensor,
    scheme: str,
    in_features: int,
    axis: int,
    dtype: str,
) -> Tensor:
    """Gather packed slices, then decode those; NaN where an index is out of range, which would kill a CUDA context."""
    places, inside = _in_range(indices, packed.shape[axis])
    if packed.shape[axis] == 0:
        shape = (*packed.shape[:axis], *indices.shape, *packed.shape[axis + 1 : -1], in_features)
        return torch.full(shape, math.nan, dtype=getattr(torch, dtype), device=packed.device)
    packed, scales, biases = (_taken(leaf, places, axis) for leaf in (packed, scales, biases))
    rows = dequantize(packed, scales, biases, scheme, in_features, dtype)
    mask = inside.reshape(*inside.shape, *(1,) * (rows.ndim - axis - inside.ndim))
    return torch.where(mask, rows, math.nan)


def dot(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    scheme: str,
    in_features: int,
    transposed: bool,
    dtype: str,
    precision: str,
) -> Tensor:
    """``matmul(x, matrix_transpose(w))``, accumulated in float32, or in float64 for float64 and for "highest"."""
    wide = precision == "highest" or torch.float64 in (x.dtype, getattr(torch, dtype))
    work = torch.float64 if wide else torch.float32
    operand = x.to(work)
    if x.ndim == 1:
        operand = operand[None, :]
    outputs = in_features if transposed else packed.shape[-2]
    batch = torch.broadcast_shapes(operand.shape[:-2], packed.shape[:-2])
    result = torch.zeros((*batch, operand.shape[-2], outputs), dtype=work, device=x.device)
    if result.numel() and operand.shape[-1]:
        with torch.autocast(x.device.type, enabled=False):
            _accumulate(result, operand, (packed, scales, biases), Scheme.parse(scheme), in_features, transposed)
    result = result.to(getattr(torch, dtype))
    return result[..., 0, :] if x.ndim == 1 else result


def _accumulate(result: Tensor, x: Tensor, leaves: Leaves, scheme: Scheme, in_features: int, transposed: bool) -> None:
    stacked = math.prod(leaves[0].shape[:-2])
    width = min(in_features, _COLUMNS)
    while width > 256 and width * stacked > TILE:
        width = -(-width // 512) * 256  # whole words and whole groups
    height = max(1, TILE // (width * stacked))
    for rows in _slices(leaves[0].shape[-2], height):
        here = tuple(leaf[..., rows, :] for leaf in leaves)
        for columns in _slices(in_features, width):
            tile = _tile(here, scheme, columns.start, columns.stop, x.dtype)
            if transposed:
                result[..., columns] += matmul(x[..., rows], tile)
            else:
                result[..., rows] += matmul(x[..., columns], tile.mT)


def gather_dot(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    scheme: str,
    in_features: int,
    transposed: bool,
    dtype: str,
    precision: str,
) -> Tensor:
    """Products of gathered packed weights; NaN where an index is out of range."""
    matrices, weights = math.prod(x.shape[:-2]), math.prod(packed.shape[:-2])
    left, left_inside = _in_range(lhs, matrices)
    right, right_inside = _in_range(rhs, weights)
    left, right = torch.broadcast_tensors(left, right)
    inside = left_inside & right_inside
    outputs = in_features if transposed else packed.shape[-2]
    if not (matrices and weights):  # no index can be in range
        shape = (*inside.shape, x.shape[-2], outputs)
        return torch.full(shape, math.nan, dtype=getattr(torch, dtype), device=x.device)
    operand = _taken(x.reshape(matrices, *x.shape[-2:]), left, 0)
    packed, scales, biases = (
        _taken(leaf.reshape(weights, *leaf.shape[-2:]), right, 0) for leaf in (packed, scales, biases)
    )
    product = dot(operand, packed, scales, biases, scheme, in_features, transposed, dtype, precision)
    return torch.where(inside[..., None, None], product, math.nan)


def _tile(leaves: tuple[Tensor, ...], scheme: Scheme, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Columns `start` to `stop` of rows in `dtype`; `start` is a multiple of 256."""
    packed, scales, biases = leaves
    words = packed[..., start * scheme.bits // 32 : -(-stop * scheme.bits // 32)]
    codes = unpack(words, scheme.bits, stop - start).to(dtype)
    scale, bias = scales.to(dtype), biases.to(dtype)
    if scheme.group_size is not None:
        group = torch.arange(start, stop, device=packed.device) // scheme.group_size
        scale, bias = scale.index_select(-1, group), bias.index_select(-1, group)
    return codes * scale + bias


def _in_range(indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Indices that are safe to read at, and which were in range."""
    indices = indices.to(torch.int64)
    inside = (indices >= -length) & (indices < length)
    wrapped = torch.where(indices < 0, indices + length, indices)
    return wrapped.clamp(0, max(length - 1, 0)), inside


def _taken(leaf: Tensor, indices: Tensor, axis: int) -> Tensor:
    """``take`` for indices of any shape; uint32 as int32, since few kernels know it."""
    bits = leaf.view(torch.int32) if leaf.dtype == torch.uint32 else leaf
    rows = bits.index_select(axis, indices.reshape(-1))
    rows = rows.reshape(*leaf.shape[:axis], *indices.shape, *leaf.shape[axis + 1 :])
    return rows.view(leaf.dtype) if leaf.dtype == torch.uint32 else rows


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
