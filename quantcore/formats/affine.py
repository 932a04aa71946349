"""What the readers of integer formats share: scales and zero points into scales and biases, proven exact or refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from quantcore.bitstream import unpack
from quantcore.errors import InexactConversionError, UnsupportedError
from quantcore.formats.checkpoint import Entry
from quantcore.formats.files import Array, Stored, malformed
from quantcore.scheme import BITS, GROUP_SIZES, Scheme
from quantcore.tensor import QuantizedTensor

__all__ = ["FLOATS", "Parts", "all_finite", "check_finite", "from_zero_points", "joined", "scheme_of"]

FLOATS: Final = ("float16", "bfloat16", "float32")
"""Dtypes that scales may have."""

_TILE: Final = 1 << 20
_EXACT_ZERO: Final = 1 << 8


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors that together are one quantized weight.

    Parameters
    ----------
    name : str
        Of the weight that they are.
    module : str
        What their names have in common.
    tensors : mapping of str to Stored
        By the rest of their names.
    """

    name: str
    module: str
    tensors: Mapping[str, Stored]

    @property
    def first(self) -> Stored:
        """The one that errors name."""
        return next(iter(self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all in the file."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def get(self, suffix: str, *dtypes: str, rank: int | None = None, needed: bool = True) -> Stored | None:
        """The part of that name, its dtype and rank checked; None where it is missing and may be."""
        stored = self.tensors.get(suffix)
        if stored is None:
            if needed:
                self.first.malformed(f"there is no {self.module}.{suffix} beside it")
            return None
        if dtypes and stored.dtype_name not in dtypes:
            stored.malformed(f"dtype {stored.dtype_name}; expected {' or '.join(dtypes)}")
        if rank is not None and len(stored.shape) != rank:
            stored.malformed(f"shape {stored.shape}; expected {rank} axes")
        return stored

    def need(self, suffix: str, *dtypes: str, rank: int | None = None) -> Stored:
        """The part of that name, its dtype and rank checked."""
        stored = self.get(suffix, *dtypes, rank=rank)
        assert stored is not None
        return stored

    def entry(self, kind: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, read: Any) -> Entry:
        """The entry of the weight."""
        return Entry(shape, dtype, kind, self.nbytes, scheme, read)


def joined(tensors: Mapping[str, Stored], marker: str, suffixes: tuple[str, ...]) -> dict[str, Parts]:
    """Weights by name, each the tensors ``X.suffix`` of every X that has an ``X.marker``.

    Raises
    ------
    FormatError
        If there is an ``X.weight`` as well, which is what the weight will be called.
    """
    found = {}
    for name, stored in tensors.items():
        module, dot, suffix = name.rpartition(".")
        if suffix != marker or not dot:
            continue
        if f"{module}.weight" in tensors:
            stored.malformed(f"there is a {module}.weight as well")
        others = {s: tensors[f"{module}.{s}"] for s in suffixes if s != marker and f"{module}.{s}" in tensors}
        found[f"{module}.weight"] = Parts(f"{module}.weight", module, {marker: stored, **others})
    return found


def scheme_of(stored: Stored, bits: int, group_size: int | None, in_features: int) -> Scheme:
    """The scheme of these numbers; a group as long as the row is one that takes the row.

    Raises
    ------
    UnsupportedError
        If there is no such scheme.
    """
    group = None if group_size in (None, in_features) and group_size not in GROUP_SIZES else group_size
    if bits not in BITS or (group is not None and group not in GROUP_SIZES):
        raise UnsupportedError(
            f"{stored.place}: {bits} bits in groups of {group} aren't supported; bits may be "
            f"{', '.join(map(str, BITS))}, groups {', '.join(map(str, GROUP_SIZES))} or a row"
        )
    return Scheme(bits=bits, group_size=group)


def check_finite(stored: Stored, values: Array) -> None:
    """Raise the FormatError that names the byte of the first NaN or infinity."""
    if not all_finite(values):
        flat = int(np.isfinite(values).reshape(-1).argmin())
        value = float(values.reshape(-1)[flat])
        offset = stored.offset + flat * stored.dtype.itemsize
        malformed(stored.file.path, f"a scale or bias is {value}", tensor=stored.name, offset=offset)


def all_finite(values: Array) -> bool:
    """Whether no number is NaN or infinite."""
    if values.dtype.itemsize != 2 or not values.size:
        return bool(np.isfinite(values).all())
    # NumPy looks at half-precision numbers one by one; at their exponents, many at a time.
    exponent = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
    return bool(np.bitwise_and(values.view(np.uint16), exponent).max() != exponent)


def from_zero_points(
    stored: Stored,
    packed: Array,
    scales: Array,
    zeros: Array,
    scheme: Scheme,
    in_features: int,
    *,
    exact: bool,
) -> QuantizedTensor:
    """The tensor for ``(code - zero) * scale``.

    Parameters
    ----------
    stored : Stored
        What errors name.
    packed : array, shape (N, words), uint32
        Codes in the canonical layout.
    scales : array, shape (N, groups), float16, bfloat16 or float32
    zeros : array, shape (N, groups)
        Integers, or floating as HQQ's.
    scheme : Scheme
    in_features : int
    exact : bool
        Whether to raise where float32 can't hold ``code * scale - zero * scale`` as the format computes it.

    Returns
    -------
    QuantizedTensor
        With float32 biases, and the scales' dtype as its logical one: a half-precision bias would round a third of the
        weights differently.

    Raises
    ------
    InexactConversionError
        Saying how many values would change, and by how much.

    Notes
    -----
    With half-precision scales and integer zero points every product and sum is exact. Otherwise all values are
    computed both ways and compared.
    """
    wide, zero = scales.astype(np.float32), zeros.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        biases = -(zero * wide)
    tensor = QuantizedTensor(packed, scales, biases, scheme, in_features, dtype=scales.dtype.name)
    check_finite(stored, biases)
    whole = zeros.dtype.kind in "iu" and int(np.abs(zeros.astype(np.int64)).max(initial=0)) <= _EXACT_ZERO
    if exact and not (whole and scales.dtype.itemsize == 2):
        _check_exact(stored, tensor, wide, zero)
    return tensor


def _check_exact(stored: Stored, tensor: QuantizedTensor, scales: Array, zeros: Array) -> None:
    in_features = tensor.in_features
    group = tensor.scheme.group_size or in_features
    step = max(1, _TILE // in_features)
    differing, largest = 0, 0.0
    for start in range(0, len(tensor.packed), step):
        rows = slice(start, start + step)
        codes = unpack(tensor.packed[rows], tensor.scheme.bits, in_features).astype(np.float32)
        scale, zero, bias = (
            np.repeat(part[rows], group, axis=1)[:, :in_features] for part in (scales, zeros, tensor.biases)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            want, got = (codes - zero) * scale, codes * scale + bias
            differing += int((want != got).sum())
            largest = max(largest, float(np.abs(want - got).max(initial=0)))
    if differing:
        raise InexactConversionError(
            f"{stored.place}: as {tensor.scheme}, {differing} of {tensor.size} values would differ from "
            f"(code - zero) * scale in float32, by at most {largest:.3g}, because its scales or zero points take more "
            "bits than a float32 product leaves; pass exact=False (--inexact) to load it so"
        )
