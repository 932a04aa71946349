"""The contract of a backend: the hooks it implements and what it says of itself.

This module is all that the author of a backend reads (with plugins.md around it). A backend is a pluggy plugin: any
object whose methods carry :data:`hookimpl`. Hooks are called directly and by position, so an implementation has the
whole signature of its hook, under the same names and in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
import pluggy

if TYPE_CHECKING:
    from quantcore.scheme import Scheme
    from quantcore.tensor import QuantizedTensor

__all__ = [
    "API_VERSION",
    "DEVIATIONS",
    "OPTIONAL_HOOKS",
    "REQUIRED_HOOKS",
    "Array",
    "Backend",
    "BackendInfo",
    "Call",
    "Precision",
    "hookimpl",
    "hookspec",
]

API_VERSION: Final = 1
"""Version of this contract; a backend that was written for another one is refused at registration."""

Array: TypeAlias = Any
"""An array of the backend's library."""

Precision: TypeAlias = Literal["default", "highest", "fast"]
"""Bound on the error of a product, as NMSE per row of x: default 1e-8, highest 1e-12, fast 1e-4."""

hookspec: Final = pluggy.HookspecMarker("quantcore")
hookimpl: Final = pluggy.HookimplMarker("quantcore")

DEVIATIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "quantize-rounding": "quantize breaks ties, or picks edge codes, unlike the reference encoder",
        "dequantize-fma": "dequantize contracts code * scale + bias into one rounding",
        "dequantize-double-rounding": "half-precision dequantize rounds the product and the sum",
        "half-weight": "half-precision dot rounds the dequantized weight to x's dtype before the product",
        "nonfinite-as-nan": "dot may give NaN where the float product is infinite",
        "flush-subnormals": "float32 numbers below the smallest normal one count as zero in dot",
    }
)
"""Departures from the numeric contract that a backend may declare, by name; the conformance kit allows no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """What a backend says of itself, without importing its framework.

    Attributes
    ----------
    name : str
        The backend's name, as in ``backend="numpy"``.
    library : str
        The array library that it computes in, as in ``qw.to("numpy")``: the root module of its namespace.
        ``"*"`` for a backend that takes arrays of any array-API library.
    array_types : tuple of str
        Types it takes, as ``"module:qualname"``; matched by isinstance once that module is loaded, so that
        subclasses and tracers match. Empty for ``library="*"``.
    requires : tuple of str
        Modules that must be importable. They are looked up without importing them, and imported when the backend is
        first used.
    install_hint : str
        What to type when a required module is missing, e.g. ``'pip install "mlx[cpu]"'``.
    priority : int
        Among the backends of one library, the highest that supports a call computes it.
    deviations : tuple of str
        Keys of :data:`DEVIATIONS`, each optionally limited to a device: ``"dequantize-fma@gpu"``.
    shape_dependent : bool
        Whether `supports` needs the shapes; they are None in the call otherwise.
    modes : tuple of str
        Modes of the schemes that it computes: ``"affine"``, and of ``"mxfp4"``, ``"mxfp8"`` and ``"nvfp4"`` those that
        it has. It isn't asked for others.
    marks_nonfinite : bool
        Whether `quantize` gives a scale that isn't finite for each group with a NaN or an infinity: then the core
        needn't look through an affine weight for them before.
    api_version : int
        The :data:`API_VERSION` that the backend was written for.
    """

    name: str
    library: str
    api_version: int
    array_types: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    install_hint: str = ""
    priority: int = 0
    deviations: tuple[str, ...] = ()
    shape_dependent: bool = False
    marks_nonfinite: bool = False
    modes: tuple[str, ...] = ("affine",)

    def deviates(self, name: str, device: str | None) -> bool:
        """Whether the backend declares the deviation `name` on `device`."""
        return name in self.deviations or f"{name}@{device}" in self.deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What `supports` decides on. Everything is static: no array is in it.

    Attributes
    ----------
    scheme : Scheme
    layout : str
        How the weight's bits lie; ``"row"`` is the canonical packing.
    transposed : bool
        False where the weight's last axis is the grouped one.
    dtype : str
        Name of the logical dtype of the weight (for ``"quantize"``, of the dense weight).
    x_dtype : str or None
        Name of x's dtype, for ``"dot"`` and ``"gather_dot"``.
    out_dtype : str
        Name of the result's dtype.
    device : str or None
        Device of x, or of the weight where there is no x; None where unknown.
    precision : {"default", "highest", "fast"}
    x_shape, w_shape : tuple of int or None
        Logical shapes, for backends that declare `shape_dependent`, and for `describe`.
    """

    scheme: "Scheme"
    layout: str
    transposed: bool
    dtype: str
    x_dtype: str | None
    out_dtype: str
    device: str | None
    precision: Precision
    x_shape: tuple[int, ...] | None = None
    w_shape: tuple[int, ...] | None = None


class Backend:
    """The hooks. `backend_info`, `supports`, `quantize`, `dequantize` and `dot` are required, the rest optional.

    What the core guarantees: shapes fit, x is float16, bfloat16, float32 or float64, all arrays are of this backend's
    library and on one device, and `supports` returned True. Arrays may be empty, strided, unaligned, read-only or
    byte-swapped; inside a trace they are tracers, whose values can't be read. `dtype`, where a hook has it, is the name
    of the result's dtype: one of those four.

    What a backend guarantees: results are the library's own arrays, on the device of the operands and in native byte
    order; inputs are never written to; errors obey the bounds of :data:`Precision`; a float64 x is computed in float64
    or refused by `supports`; the hooks may be called from several threads at once.

    A weight's arrays are always in their stored order, groups along the last axis. Where ``qw.transposed``, the logical
    weight, and so ``qw.shape``, is that with its last two axes swapped.
    """

    @hookspec
    def backend_info(self) -> BackendInfo:  # type: ignore[empty-body]
        """Describe the backend. Called once, at registration."""

    @hookspec
    def prepare(self) -> None:
        """Called once, when the backend is first used: after what it requires was imported, before its other hooks.

        For telling its framework of :class:`~quantcore.QuantizedTensor` (a pytree, an operator). First use is also
        when the first tensor over arrays of this backend is made.
        """

    @hookspec
    def supports(self, op: str, call: Call) -> bool | str:  # type: ignore[empty-body]
        """Whether the backend computes this call: True, or the reason why not (a sentence for the user).

        The answer is kept: it must depend on the arguments alone, and on shapes only with `shape_dependent` declared.
        For ``"prepack"``, a layout of the backend's own means `canonical`.

        Parameters
        ----------
        op : {"quantize", "dequantize", "dot", "take", "gather_dot", "prepack"}
        call : Call
        """

    @hookspec
    def describe(self, op: str, call: Call) -> str:  # type: ignore[empty-body]
        """How the backend computes a call that it supports, for ``quantcore.explain``.

        One sentence without a full stop: which of its kernels, and why not a faster one. It is asked for nothing else,
        so that the call has its shapes, whatever `shape_dependent` says. Empty where there is nothing to tell.

        Parameters
        ----------
        op : {"quantize", "dequantize", "dot", "take", "gather_dot", "prepack"}
        call : Call
        """

    @hookspec
    def quantize(self, w: Array, scheme: "Scheme") -> tuple[Array, Array, Array | None]:  # type: ignore[empty-body]
        """Quantize along the last axis, by the encoder that plugins.md writes out.

        Parameters
        ----------
        w : array, shape (..., N, K), float16, bfloat16 or float32
            All elements are finite, unless w is traced or the backend has `marks_nonfinite`. K ≥ 1 need not be whole
            groups: then the last group is short, and encoded as if its last element were repeated.
        scheme : Scheme

        Returns
        -------
        packed : array, shape scheme.packed_shape(w.shape), uint32
            Each row one little-endian bitstream, spare bits zero.
        scales, biases : array, shape scheme.scales_shape(w.shape), w's dtype
            Infinite ones, where w's dtype can't hold them, are reported by the core. In the microscaled modes, scales
            are uint8 and biases None.
        """

    @hookspec
    def dequantize(self, qw: "QuantizedTensor", dtype: str) -> Array:
        """Dense weight: ``float32(code) * float32(scale) + float32(bias)``, rounded once to `dtype`.

        In the microscaled modes ``float32(element) * float32(scale)``, rounded once.

        Parameters
        ----------
        qw : QuantizedTensor, shape (..., N, K)
            Never transposed: the core transposes the result.
        dtype : str
            Name of the result's dtype.

        Returns
        -------
        array, shape (..., N, K)
        """

    @hookspec
    def dot(self, x: Array, qw: "QuantizedTensor", dtype: str, precision: Precision) -> Array:
        """Product of x with the weight, over the last axis of both: ``matmul(x, matrix_transpose(w))``.

        Parameters
        ----------
        x : array, shape (..., M, K), or (K,) where `qw` has two axes
        qw : QuantizedTensor, shape (..., N, K)
            Where ``qw.transposed``, the contracted axis is the ungrouped one: with S the stored, dense weight the
            product is ``x @ S``, otherwise ``x @ matrix_transpose(S)``.
        dtype : str
            Name of the result's dtype.
        precision : {"default", "highest", "fast"}

        Returns
        -------
        array, shape (..., M, N), or (N,) for 1-D x; the leading axes broadcast
        """

    @hookspec
    def take(self, qw: "QuantizedTensor", indices: Array, axis: int, dtype: str) -> Array:
        """Dense slices of the weight along an ungrouped axis, without dequantizing the rest.

        Parameters
        ----------
        qw : QuantizedTensor
            Never transposed.
        indices : array of integers, of any shape
            Of this backend's library. Negative ones count from the end. One out of range raises IndexError, or, in
            a library that computes lazily, gives NaN.
        axis : int
            From 0 to ``qw.ndim - 2``.
        dtype : str
            Name of the result's dtype.

        Returns
        -------
        array, shape ``qw.shape[:axis] + indices.shape + qw.shape[axis + 1:]``
        """

    @hookspec
    def gather_dot(
        self,
        x: Array,
        qw: "QuantizedTensor",
        lhs_indices: Array,
        rhs_indices: Array,
        dtype: str,
        precision: Precision,
    ) -> Array:
        """Products of chosen matrices of x with chosen matrices of a stack of weights.

        Parameters
        ----------
        x : array, shape (..., M, K)
        qw : QuantizedTensor, shape (..., N, K)
        lhs_indices, rhs_indices : array of integers
            Flat indices into the leading axes of x and of qw; they broadcast. Negative ones count from the end.
            One out of range raises IndexError, or, in a library that computes lazily, gives NaN.
        dtype : str
        precision : {"default", "highest", "fast"}

        Returns
        -------
        array, shape broadcast(lhs_indices, rhs_indices).shape + (M, N)
        """

    @hookspec
    def prepack(self, qw: "QuantizedTensor") -> "QuantizedTensor":  # type: ignore[empty-body]
        """The weight in a layout of the backend's own (its name in ``.layout``), for speed.

        Scheme, dtype, `in_features` and orientation stay. ``packed`` may be of any dtype; its shape is
        (..., N, anything), and row n of it, of scales and of biases holds row n of the weight alone, so that the tensor
        can be indexed. `canonical` undoes it exactly.
        """

    @hookspec
    def canonical(self, qw: "QuantizedTensor") -> "QuantizedTensor":  # type: ignore[empty-body]
        """The weight in the canonical layout ``"row"``, bit for bit; required where `prepack` is implemented."""

    @hookspec
    def from_numpy(self, array: np.ndarray[Any, Any], device: Any) -> Array:
        """The library's array with these elements, on `device` (None: the default); without a copy where possible."""

    @hookspec
    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:  # type: ignore[empty-body]
        """NumPy's array with these elements, bfloat16 as ``ml_dtypes.bfloat16``; without a copy where possible."""


REQUIRED_HOOKS: Final = ("backend_info", "supports", "quantize", "dequantize", "dot")
OPTIONAL_HOOKS: Final = ("prepare", "describe", "take", "gather_dot", "prepack", "canonical", "from_numpy", "to_numpy")
