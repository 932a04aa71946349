"""Backends that are wrong in one way each, on top of one that is right: what the conformance kit must catch."""

from __future__ import annotations

import time
from typing import Any

import ml_dtypes
import numpy as np

import quantcore as qc
from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl
from quantcore.scheme import MODES
from quantcore.testing import oracle

Array = np.ndarray[Any, Any]


class Reference:
    """A right backend for NumPy's arrays, made of the oracle. It is asked only by name."""

    name = "reference"
    deviations: tuple[str, ...] = ()

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            api_version=1,
            name=self.name,
            library="numpy",
            array_types=("numpy:ndarray",),
            priority=-2000,
            deviations=self.deviations,
            modes=MODES,
        )

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        return True if call.layout == "row" else "knows the layout 'row' only"

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
        return oracle.encode(w, scheme)

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        return oracle.dequantize(qw.packed, qw.scales, qw.biases, qw.scheme, qw.in_features, dtype)

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        with np.errstate(over="ignore"):
            return oracle.product(x, self.weight(qw)).astype(oracle.numpy_dtype(dtype))

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        return oracle.take(self.dequantize(qw, dtype), indices.astype(np.intp), axis)

    def weight(self, qw: QuantizedTensor) -> Array:
        dense = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, qw.in_features)
        return np.swapaxes(dense, -1, -2) if qw.transposed else dense


class RoundsTiesAway(Reference):
    name = "rounds ties away"

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
        _, scales, biases = oracle.encode(w, scheme)
        exact_scales, exact_biases = oracle.encode(w.astype(np.float32), scheme)[1:]
        group = np.arange(w.shape[-1]) // (scheme.group_size or w.shape[-1])
        steps = (w.astype(np.float32) - exact_biases[..., group]) / exact_scales[..., group]
        codes = np.clip(np.floor(steps + np.float32(0.5)), 0, 2**scheme.bits - 1)
        return oracle.pack_codes(codes.astype(np.int64), scheme.bits), scales, biases


class DeclaredToRoundTiesAway(RoundsTiesAway):
    name = "declared to round ties away"
    deviations = ("quantize-rounding",)


class EncodesTwiceTheRange(Reference):
    name = "encodes twice the range"
    deviations = ("quantize-rounding",)

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
        packed, scales, biases = oracle.encode(w, scheme)
        return packed, 2 * scales, biases


class LeavesSpareBitsSet(Reference):
    name = "leaves spare bits set"

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
        packed, scales, biases = oracle.encode(w, scheme)
        if w.shape[-1] * scheme.bits % 32:
            packed[..., -1] |= np.uint32(1 << 31)
        return packed, scales, biases


class DequantizesWithTwoRoundings(Reference):
    name = "dequantizes with two roundings"

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        kind = oracle.numpy_dtype(dtype)
        codes = oracle.decode_codes(qw.packed, qw.scheme.bits, qw.in_features).astype(kind)
        group = np.arange(qw.in_features) // (qw.scheme.group_size or qw.in_features)
        scaled = (codes * qw.scales.astype(kind)[..., group]).astype(kind)
        return np.asarray(scaled + qw.biases.astype(kind)[..., group])


class DeclaredToDequantizeWithTwoRoundings(DequantizesWithTwoRoundings):
    name = "declared to dequantize with two roundings"
    deviations = ("dequantize-double-rounding",)


class AccumulatesInHalfPrecision(Reference):
    name = "accumulates in half precision"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        if x.dtype != np.float16 or x.ndim != 2 or qw.ndim != 2:
            return super().dot(x, qw, dtype, precision)
        terms = x[:, None, :] * self.weight(qw).astype(np.float16)
        return np.add.accumulate(terms, axis=-1, dtype=np.float16)[..., -1].astype(oracle.numpy_dtype(dtype))


class QuantizesActivations(Reference):
    name = "quantizes activations to 8 bits"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        largest = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True, initial=0.0)
        scale = np.where(np.isfinite(largest) & (largest > 0), largest / 127, 1)
        return super().dot(np.rint(x / scale) * scale, qw, dtype, precision)


class NarrowsFloat64(Reference):
    name = "narrows float64"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        return super().dot(x.astype(np.float32) if x.dtype == np.float64 else x, qw, dtype, precision)


class _OwnArray(np.ndarray[Any, Any]):
    pass


class GivesAnotherArrayType(Reference):
    name = "gives another array type"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        return super().dot(x, qw, dtype, precision).view(_OwnArray)


class GivesFloat32(Reference):
    name = "gives float32 whatever is asked"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        return super().dot(x, qw, "float32", precision)


class GivesSwappedBytes(Reference):
    name = "gives swapped bytes"

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        dense = super().dequantize(qw, dtype)
        return dense if dense.dtype == ml_dtypes.bfloat16 else dense.astype(dense.dtype.newbyteorder())


class IgnoresOrientation(Reference):
    name = "ignores orientation"

    def weight(self, qw: QuantizedTensor) -> Array:
        dense = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, qw.in_features)
        square = dense.shape[-1] == dense.shape[-2]
        return dense if square or not qw.transposed else np.swapaxes(dense, -1, -2)


class TakesTheFirstOfTheStack(Reference):
    name = "takes the first of the stack"

    def weight(self, qw: QuantizedTensor) -> Array:
        dense = super().weight(qw)
        return np.broadcast_to(dense[:1], dense.shape) if dense.ndim > 2 and dense.shape[0] else dense


class HidesWhatIsNotFinite(Reference):
    name = "hides what isn't finite"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        return super().dot(np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0), qw, dtype, precision)


class GivesNaNForInfinity(Reference):
    name = "gives NaN for infinity"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        return super().dot(np.where(np.isfinite(x), x, np.nan).astype(x.dtype), qw, dtype, precision)


class DeclaredToGiveNaNForInfinity(GivesNaNForInfinity):
    name = "declared to give NaN for infinity"
    deviations = ("nonfinite-as-nan",)


class OverwritesX(Reference):
    name = "overwrites x"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        result = super().dot(x, qw, dtype, precision)
        if x.flags.writeable:
            x[...] = 0
        return result


class ReadsMemoryAsItLies(Reference):
    name = "reads memory as it lies"

    def weight(self, qw: QuantizedTensor) -> Array:
        leaves = (leaf.view(leaf.dtype.newbyteorder("=")) for leaf in (qw.packed, qw.scales, qw.biases))
        with np.errstate(all="ignore"):
            dense = oracle.exact_weight(*leaves, qw.scheme, qw.in_features)
        return np.swapaxes(dense, -1, -2) if qw.transposed else dense


class SharesABuffer(Reference):
    name = "shares a buffer between threads"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        self.operand = x
        time.sleep(0.002)
        return super().dot(self.operand, qw, dtype, precision)


class ClipsIndices(Reference):
    name = "clips indices"

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        return np.take(self.dequantize(qw, dtype), indices.astype(np.intp), axis, mode="wrap")


class RefusesEverything(Reference):
    name = "refuses everything"

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        return "it is Sunday"


class RefusesWithoutReason(Reference):
    name = "refuses without a reason"

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        return call.scheme.bits == 4


class RaisesInSupports(Reference):
    name = "raises in supports"

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        return bool(call.x_shape[0])  # type: ignore[index]  # None, as shape_dependent isn't declared


class PromisesTooMuch(Reference):
    name = "promises too much"

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        raise qc.UnsupportedError("not today")


class LosesARowInItsLayout(Reference):
    name = "loses a row in its layout"

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        return True

    @hookimpl
    def prepack(self, qw: QuantizedTensor) -> QuantizedTensor:
        return _relaid(qw, qw.packed[..., ::-1], "reversed")

    @hookimpl
    def canonical(self, qw: QuantizedTensor) -> QuantizedTensor:
        packed = np.ascontiguousarray(qw.packed[..., ::-1])
        packed[..., -1, :] = 0
        return _relaid(qw, packed, "row")


class RoundsHalvesTowardsZero(Reference):
    """As MLX's CPU does with e2m1."""

    name = "rounds halves towards zero"

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
        packed, scales, biases = oracle.encode(w, scheme)
        if scheme.mode != "mxfp4" or not w.size:
            return packed, scales, biases
        by = oracle.MICROSCALED["mxfp4"][1][scales].astype(np.float32)
        scaled = w.astype(np.float32) / np.repeat(by, 32, axis=-1)[..., : w.shape[-1]]
        elements = oracle.MICROSCALED["mxfp4"][0].astype(np.float32)
        return oracle.pack_codes(np.abs(scaled[..., None] - elements).argmin(axis=-1), 4), scales, None


class ReadsNaNAsANumber(Reference):
    name = "reads NaN as a number"

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        return np.nan_to_num(super().dequantize(qw, dtype))


class SwapsNibbles(Reference):
    name = "swaps nibbles"

    def weight(self, qw: QuantizedTensor) -> Array:
        dense = super().weight(qw)
        if qw.scheme.mode != "nvfp4" or not dense.size:
            return dense
        stored = np.swapaxes(dense, -1, -2) if qw.transposed else dense
        swapped = np.arange(stored.shape[-1]) ^ 1
        stored = stored[..., np.minimum(swapped, stored.shape[-1] - 1)]
        return np.swapaxes(stored, -1, -2) if qw.transposed else stored


def _relaid(qw: QuantizedTensor, packed: Array, layout: str) -> QuantizedTensor:
    return QuantizedTensor(packed, qw.scales, qw.biases, qw.scheme, qw.in_features, dtype=qw.dtype_name, layout=layout)


BACKENDS = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, Reference)
}
