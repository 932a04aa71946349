"""Codes to and from little-endian bitstreams in torch, on any device, through int32: torch can't shift uint32."""

import torch

__all__ = ["pack", "unpack"]

Tensor = torch.Tensor

_WORD = 32


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row.

    Parameters
    ----------
    packed : Tensor, shape (..., W), uint32
    bits : int
    count : int

    Returns
    -------
    Tensor, shape (..., count), int32
    """
    words = packed.contiguous().view(torch.int32)
    mask = (1 << bits) - 1
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
        codes = (words.unsqueeze(-1) >> shifts) & mask  # the sign that >> copies lies above the mask
        return codes.reshape(*words.shape[:-1], words.shape[-1] * (_WORD // bits))[..., :count]
    start = torch.arange(count, dtype=torch.int32, device=words.device) * bits
    first, shift = start // _WORD, start % _WORD
    crossing = shift + bits > _WORD  # goes on in the next word
    second = (first + 1).clamp(max=max(words.shape[-1] - 1, 0))
    back = torch.where(crossing, _WORD - shift, 0)
    low_mask = torch.where(crossing, (1 << back) - 1, mask)
    low = (words.index_select(-1, first) >> shift) & low_mask
    high = (words.index_select(-1, second) << back) & mask
    return low | torch.where(crossing, high, 0)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Parameters
    ----------
    codes : Tensor, shape (..., K), int64
        Each below ``2**bits``.
    bits : int

    Returns
    -------
    Tensor, shape (..., ceil(K * bits / 32)), uint32
        Spare bits at a row's end are zero.
    """
    *leading, count = codes.shape
    blocks = -(-count // _WORD)
    padded = torch.nn.functional.pad(codes, (0, blocks * _WORD - count)).reshape(*leading, blocks, _WORD)
    words: list[Tensor] = []
    for word in range(bits):
        value = torch.zeros_like(padded[..., 0])
        for place in range(_WORD):
            shift = place * bits - word * _WORD
            if -bits < shift < _WORD:
                code = padded[..., place]
                value |= code << shift if shift >= 0 else code >> -shift
        words.append(value & 0xFFFFFFFF)
    stream = torch.stack(words, dim=-1).reshape(*leading, blocks * bits)[..., : -(-count * bits // _WORD)]
    signed = torch.where(stream >= 1 << 31, stream - (1 << 32), stream)
    return signed.to(torch.int32).contiguous().view(torch.uint32)
