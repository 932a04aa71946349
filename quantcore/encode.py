"""Making quantized tensors: from dense weights, and from arrays that exist already."""

import math
import operator
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np

from quantcore import arrays, dispatch
from quantcore.dtypes import LOGICAL_DTYPES, REAL_FLOATING, dtype_name, native_dtype
from quantcore.scheme import Scheme
from quantcore.tensor import QuantizedTensor

__all__ = ["quantize", "quantized_tensor"]

_NONFINITE: Final = ("raise", "clip")
_NVFP4_LARGEST: Final = 2784.0
"""Six times what still rounds to 448, the largest scale in e4m3."""


def quantize(
    w: Any,
    /,
    scheme: Scheme | str | None = None,
    *,
    bits: int | None = None,
    group_size: int | Literal["row"] | None = None,
    mode: str | None = None,
    axis: int = -1,
    pad: bool = False,
    nonfinite: Literal["raise", "clip"] = "raise",
    backend: str | None = None,
) -> QuantizedTensor:
    """Quantize a dense weight group-wise.

    Parameters
    ----------
    w : array, shape (..., N, K), real floating
        float64 is encoded from its float32 value, and the result's dtype is float32.
    scheme : Scheme or str, optional
        ``"affine-int4-g64"``, say, or ``"mxfp4"``. Give either this or `bits`, `group_size` and `mode`.
    bits : {1, 2, 3, 4, 5, 6, 8}, optional
        Default 4; the microscaled modes fix it.
    group_size : {16, 32, 64, 128, 256, "row"}, optional
        Default 64; ``"row"`` is one group per row. The microscaled modes fix it.
    mode : {"affine", "mxfp4", "mxfp8", "nvfp4"}, optional
    axis : {-1, -2}
        The axis along which groups lie. For −2 the result is the `.mT` of a tensor packed along its last axis.
    pad : bool
        Whether an axis that isn't whole groups may end in a short one, encoded as if its last element were repeated.
    nonfinite : {"raise", "clip"}
        What to do with NaN and infinities: an error that names the position, or NaN → 0 and ±inf → the largest
        finite magnitude of the group.
    backend : str, optional
        The backend to use; by default the one of w's library.

    Returns
    -------
    QuantizedTensor, shape (..., N, K)

    Raises
    ------
    TypeError, ValueError
        If w or an option is unfit, or if w, or a scale or bias once rounded to w's dtype, isn't finite; in nvfp4, whose
        scales reach 448, if a weight is larger than 2784.

    Notes
    -----
    The affine encoder is the one of MLX's CPU kernel: per group, the edge of larger magnitude is represented
    exactly up to rounding, zero is a code where it can be, and everything is computed in float32. Inside a trace
    (mx.compile, jax.jit) values can't be looked at: non-finite ones then aren't reported.

    The microscaled encoders divide a group by its scale: the least power of two that isn't below its largest magnitude
    / 6 (mxfp8: / 448), as in MLX 0.32.4; in nvfp4 the nearest e4m3. Quotients become the nearest element, halves to
    even, the largest for what lies beyond. A group of zeros has the scale 1, or 0 in nvfp4.
    """
    chosen = _scheme(scheme, bits, group_size, mode)
    flip = _check_weight(w, axis)
    if nonfinite not in _NONFINITE:
        raise ValueError(f"quantize: nonfinite must be 'raise' or 'clip', not {nonfinite!r}")
    xp = arrays.plain_namespace(w)
    dense = xp.matrix_transpose(w) if flip else w
    in_features = int(dense.shape[-1])
    _check_groups(chosen, tuple(w.shape), in_features, pad)
    if dtype_name(dense.dtype) == "float64":
        with np.errstate(over="ignore"):
            dense = xp.astype(dense, native_dtype("float32", dense))
    traced = arrays.is_traced(dense)
    if nonfinite == "clip":
        dense = _clipped(dense, chosen, xp)
    route = dispatch.quantize_route(dense, chosen, backend)
    marked = route.marks_nonfinite and chosen.has_biases
    if not (traced or nonfinite == "clip" or marked):
        _check_elements(dense, chosen, xp, flip)
    if chosen.mode == "nvfp4" and not traced:
        _check_nvfp4_range(dense, xp, flip)
    packed, scales, biases = route.function(dense, chosen)
    if not traced:
        arrays.evaluate(*(leaf for leaf in (packed, scales, biases) if leaf is not None))
    if chosen.has_biases and not traced:
        if not _are_finite(scales, xp):
            _check_elements(dense, chosen, xp, flip)
        _check_per_group(scales, "the scale", chosen, xp)
        _check_per_group(biases, "the bias", chosen, xp)
    return QuantizedTensor(packed, scales, biases, chosen, in_features, dtype=dtype_name(dense.dtype), transposed=flip)


def quantized_tensor(
    packed: Any,
    scales: Any,
    biases: Any,
    shape: Sequence[int],
    scheme: Scheme | str,
    *,
    dtype: Any = None,
) -> QuantizedTensor:
    """Annotate arrays that are quantized already, from a checkpoint, say; without a copy.

    Parameters
    ----------
    packed : array, shape scheme.packed_shape(shape), uint32
        Codes, each row one little-endian bitstream.
    scales, biases : array, shape scheme.scales_shape(shape), real floating
        In the microscaled modes, `scales` is uint8 and `biases` None. NumPy's that are read-only, with all that they
        are views of, are looked at once, and must stay as they are: where all groups have one zero point, products
        need not read the biases.
    shape : sequence of int
        Logical shape (..., N, K) of the weight.
    scheme : Scheme or str
    dtype : dtype or str, optional
        The float dtype that it dequantizes to; by default the promotion of scales' and biases', and float32 in the
        microscaled modes.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    TypeError, ValueError
        Naming the array whose library, device, dtype or shape doesn't fit.
    """
    chosen = Scheme.parse(scheme)
    try:
        shape = tuple(operator.index(length) for length in shape)
    except TypeError:
        raise TypeError(f"quantized_tensor: shape must be a sequence of ints, not {shape!r}") from None
    if len(shape) < 2 or min(shape) < 0 or shape[-1] < 1:
        raise ValueError(f"quantized_tensor: shape must be (..., N, K) with K ≥ 1, not {shape}")
    if (biases is not None) != chosen.has_biases:
        fix = "needs biases, not None" if biases is None else "has no biases; pass None"
        raise TypeError(f"quantized_tensor: {chosen} {fix}")
    parts = {"packed": packed, "scales": scales}
    if chosen.has_biases:
        parts["biases"] = biases
    for name, part in parts.items():
        if not arrays.is_array(part):
            raise TypeError(f"quantized_tensor: {name} must be an array, not {type(part).__name__}")
    _check_together(parts)
    wanted = {"packed": chosen.packed_shape(shape), "scales": chosen.scales_shape(shape)}
    wanted["biases"] = wanted["scales"]
    for name, part in parts.items():
        if tuple(part.shape) != wanted[name]:
            raise ValueError(
                f"quantized_tensor: {name} has shape {tuple(part.shape)}; a weight of shape {shape} as {chosen} has "
                f"{name} of shape {wanted[name]}"
            )
    if dtype_name(packed.dtype) != "uint32":
        raise TypeError(f"quantized_tensor: packed must be uint32, not {dtype_name(packed.dtype)}")
    for name, part in parts.items():
        found = dtype_name(part.dtype)
        if name != "packed" and not (found in REAL_FLOATING if chosen.has_biases else found == "uint8"):
            kind = "real floating" if chosen.has_biases else f"uint8 in {chosen}"
            raise TypeError(f"quantized_tensor: {name} must be {kind}, not {found}")
    if dtype is not None and dtype_name(dtype) not in LOGICAL_DTYPES:
        raise TypeError(f"quantized_tensor: dtype must be one of {', '.join(LOGICAL_DTYPES)}, not {dtype!r}")
    return QuantizedTensor(packed, scales, biases, chosen, shape[-1], dtype=dtype)


# --- checks ---------------------------------------------------------------------------------------------------


def _scheme(scheme: Any, bits: Any, group_size: Any, mode: Any) -> Scheme:
    if scheme is not None:
        if (bits, group_size, mode) != (None, None, None):
            raise TypeError("quantize: give either scheme, or bits, group_size and mode, not both")
        return Scheme.parse(scheme)
    if isinstance(group_size, str) and group_size != "row":
        raise ValueError(f"quantize: group_size must be an integer or 'row', not {group_size!r}")
    try:
        return Scheme(
            "affine" if mode is None else mode,
            ... if bits is None else bits,
            ... if group_size is None else None if group_size == "row" else group_size,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"quantize: {error}") from None


def _check_weight(w: Any, axis: Any) -> bool:
    """Check w and the axis; whether the groups lie along axis −2."""
    if isinstance(w, QuantizedTensor):
        raise TypeError(f"quantize: the weight is quantized already ({w.scheme}); call .dequantize() first")
    if not arrays.is_array(w):
        raise TypeError(f"quantize: the weight must be an array, not {type(w).__name__}")
    name = dtype_name(w.dtype)
    if name not in REAL_FLOATING:
        raise TypeError(f"quantize: the weight must be real floating, not {name}; cast it, e.g. to float32")
    if len(w.shape) < 2:
        raise ValueError(f"quantize: the weight needs at least 2 axes, not {len(w.shape)} (shape {tuple(w.shape)})")
    arrays.refuse_sparse("quantize", "the weight", w)
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"quantize: axis must be -1 or -2, not {axis!r}")
    axis = operator.index(axis)
    if axis not in (-1, -2):
        raise ValueError(f"quantize: axis must be -1 or -2, not {axis} (shape {tuple(w.shape)})")
    return bool(axis == -2)


def _check_groups(scheme: Scheme, shape: tuple[int, ...], in_features: int, pad: bool) -> None:
    if in_features < 1:
        raise ValueError(f"quantize: the grouped axis of a weight of shape {shape} is empty; it needs an element")
    if not pad and not scheme.divides(in_features):
        raise ValueError(
            f"quantize: {in_features} elements along the grouped axis (shape {shape}) aren't whole groups of "
            f"{scheme.group_size} ({scheme}); pass pad=True to end in a short group, or another group_size"
        )


def _check_together(parts: dict[str, Any]) -> None:
    first = parts["packed"]
    library, device = arrays.library_of(first), arrays.device_of(first)
    for name, part in parts.items():
        if arrays.library_of(part) != library:
            raise TypeError(
                f"quantized_tensor: packed is a {library} array and {name} of {arrays.library_of(part)}; all "
                "must be of one library (quantcore.to_library moves an array)"
            )
        other = arrays.device_of(part)
        if other != device and None not in (other, device):  # None: traced
            raise TypeError(f"quantized_tensor: packed is on {device} and {name} on {other}; all must be on one device")


# --- values that can't be encoded -----------------------------------------------------------------------------


def _are_finite(values: Any, xp: Any) -> bool:
    return math.prod(values.shape) == 0 or bool(xp.all(xp.isfinite(values)))


def _check_elements(w: Any, scheme: Scheme, xp: Any, flip: bool) -> None:
    """Raise unless all elements of a weight are finite; `flip` if it was given transposed."""
    if not _are_finite(w, xp):
        position, value = _first_not_finite(w, xp)
        raise ValueError(
            f"quantize: the weight is {value} at {_as_given(position, flip)} ({scheme}); pass nonfinite='clip' to "
            "replace NaN by 0 and ±inf by the group's largest finite magnitude"
        )


def _check_per_group(values: Any, what: str, scheme: Scheme, xp: Any) -> None:
    """Raise unless what each group has one of is finite."""
    if not _are_finite(values, xp):
        position, value = _first_not_finite(values, xp)
        raise ValueError(
            f"quantize: {what} of row {position[:-1]}, group {position[-1]} is {value} in "
            f"{dtype_name(values.dtype)} ({scheme}): the group spans more than that dtype can hold; cast the weight to "
            "float32 or scale it down"
        )


def _first_not_finite(values: Any, xp: Any) -> tuple[tuple[int, ...], float]:
    marks = xp.astype(xp.reshape(xp.isfinite(values), (-1,)), native_dtype("uint8", values))
    return _found(values, int(xp.argmin(marks)))


def _check_nvfp4_range(w: Any, xp: Any, flip: bool) -> None:
    """Raise where a scale would be cut off at e4m3's largest by more than rounding does."""
    if math.prod(w.shape) == 0:
        return
    magnitude = xp.astype(xp.abs(w), native_dtype("float32", w))
    if float(xp.max(magnitude)) <= _NVFP4_LARGEST:
        return
    position, value = _found(w, int(xp.argmax(xp.reshape(magnitude, (-1,)))))
    raise ValueError(
        f"quantize: the weight is {value} at {_as_given(position, flip)}; nvfp4 reaches {_NVFP4_LARGEST}: scale "
        "the weight down, or use mxfp4, whose scales have float32's range"
    )


def _found(values: Any, flat: int) -> tuple[tuple[int, ...], float]:
    """Position and value of an element, counted row by row."""
    position = tuple(int(i) for i in np.unravel_index(flat, tuple(values.shape)))
    return position, float(values[position])


def _as_given(position: tuple[int, ...], flip: bool) -> tuple[int, ...]:
    """The position in the weight that the user gave, whose last two axes may have been swapped."""
    return (*position[:-2], *position[:-3:-1]) if flip else position


def _clipped(w: Any, scheme: Scheme, xp: Any) -> Any:
    """W with NaN → 0 and ±inf → the group's largest finite magnitude."""
    *leading, in_features = w.shape
    group = scheme.group_size or in_features
    missing = -in_features % group
    zero = xp.zeros_like(w)
    magnitude = xp.where(xp.isfinite(w), xp.abs(w), zero)
    if missing:
        filler = xp.broadcast_to(zero[..., :1], (*leading, missing))
        magnitude = xp.concat([magnitude, filler], axis=-1)
    largest = xp.max(xp.reshape(magnitude, (*leading, scheme.groups(in_features), group)), axis=-1, keepdims=True)
    spread = xp.broadcast_to(largest, (*leading, scheme.groups(in_features), group))
    spread = xp.reshape(spread, (*leading, in_features + missing))[..., :in_features]
    infinite = xp.where(w > 0, spread, -spread)
    return xp.where(xp.isfinite(w), w, xp.where(xp.isnan(w), zero, infinite))
