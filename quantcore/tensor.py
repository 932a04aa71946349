"""The annotated tensor: packed codes, scales and biases of one array library, and how to read them."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Final, NoReturn

import array_api_compat
import numpy as np

from quantcore import arrays
from quantcore.dtypes import LOGICAL_DTYPES, dtype_name, native_dtype, result_dtype
from quantcore.scheme import Scheme

__all__ = ["Annotation", "QuantizedTensor", "is_quantized"]


class Annotation:
    """What dispatch reads of a tensor: array type, scheme, layout, orientation, dtype. Equal ones are one object."""

    __slots__ = ("_flipped", "array_type", "dtype", "fresh", "layout", "scheme", "transposed")

    _interned: ClassVar[dict[tuple[type, Scheme, str, bool, str], "Annotation"]] = {}

    def __init__(self, array_type: type, scheme: Scheme, layout: str, transposed: bool, dtype: str) -> None:
        self.array_type = array_type
        self.scheme = scheme
        self.layout = layout
        self.transposed = transposed
        self.dtype = dtype
        self.fresh = array_type is not np.ndarray  # whether no tensor was made with it yet
        self._flipped: Annotation | None = None

    @property
    def flipped(self) -> "Annotation":
        """The annotation of the tensor's `.mT`."""
        if self._flipped is None:
            self._flipped = Annotation.of(self.array_type, self.scheme, self.layout, not self.transposed, self.dtype)
        return self._flipped

    @classmethod
    def of(cls, array_type: type, scheme: Scheme, layout: str, transposed: bool, dtype: str) -> "Annotation":
        """The one annotation with these values."""
        key = (array_type, scheme, layout, transposed, dtype)
        found = cls._interned.get(key)
        return found if found is not None else cls._interned.setdefault(key, cls(*key))


_new: Final = object.__new__
# object.__setattr__ is written out below: torch.compile follows it so, but under no other name.


class QuantizedTensor:
    """A weight quantized group-wise, of any rank ≥ 2, in any array library.

    Invariants, for a weight of logical shape ``(..., N, K)`` (before `.mT`):

    - `packed` is uint32 of shape ``(..., N, ceil(K * bits / 32))``: each row one little-endian bitstream, in which
      code i takes the bits from ``i * bits``; spare bits at the row's end are zero. This is the layout ``"row"``;
      a backend's own layout keeps the leading axes.
    - `scales` and `biases` are real floating, of shape ``(..., N, ceil(K / group_size))``; element k of a row
      stands for ``scales[k // group_size] * code[k] + biases[k // group_size]``. In the microscaled modes, `scales`
      is uint8, `biases` None, and codes and scales are the bits of small floats: see :class:`~quantcore.Scheme`.
    - They are arrays of one library on one device. They are never written to.
    - `shape` follows from ``packed.shape``, so that it stays true when a transformation maps over the arrays.
    - Where `transposed`, the tensor stands for ``(..., K, N)`` with the groups along axis −2.

    Make one with :func:`quantcore.quantize` or, from existing arrays, :func:`quantcore.quantized_tensor`, which
    validates. The constructor doesn't: it is for rebuilding from leaves, which may be tracers.

    Comparison and hash are by identity. It is no array: ``np.asarray`` raises and says to dequantize.

    Parameters
    ----------
    packed, scales : array
    biases : array or None
    scheme : Scheme
    in_features : int
        Logical length of the grouped axis.
    dtype : str or dtype, optional
        The float dtype that the tensor dequantizes to; by default the promotion of scales' and biases', and float32
        without biases.
    layout : str
        How the bits lie.
    transposed : bool
        Whether the grouped axis is −2 instead of −1.
    """

    __slots__ = ("__weakref__", "annotation", "biases", "in_features", "packed", "scales")

    packed: Any
    scales: Any
    biases: Any
    in_features: int
    annotation: Annotation

    def __init__(
        self,
        packed: Any,
        scales: Any,
        biases: Any,
        scheme: Scheme,
        in_features: int,
        *,
        dtype: Any = None,
        layout: str = "row",
        transposed: bool = False,
    ) -> None:
        name = _default_dtype(scales, biases) if dtype is None else dtype_name(dtype)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "biases", biases)
        object.__setattr__(self, "in_features", in_features)
        note = Annotation.of(type(packed), scheme, layout, transposed, name)
        if note.fresh:
            _activate_backends(note, packed)
        object.__setattr__(self, "annotation", note)

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def scheme(self) -> Scheme:
        """Mode, bits and group size."""
        return self.annotation.scheme

    @property
    def layout(self) -> str:
        """How the bits lie: ``"row"``, or the name of a backend's own layout."""
        return self.annotation.layout

    @property
    def transposed(self) -> bool:
        """Whether the grouped axis is −2 instead of −1."""
        return self.annotation.transposed

    @property
    def dtype_name(self) -> str:
        """Name of the logical dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``."""
        return self.annotation.dtype

    @property
    def dtype(self) -> Any:
        """The logical dtype, as the array library's own dtype object."""
        return native_dtype(self.annotation.dtype, self.scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        *leading, rows, _ = self.packed.shape
        if self.annotation.transposed:
            return (*leading, self.in_features, rows)
        return (*leading, rows, self.in_features)

    @property
    def ndim(self) -> int:
        """Number of axes, at least 2."""
        return len(self.packed.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def device(self) -> Any:
        """The device of the arrays, as their library names it."""
        if hasattr(self.packed, "device"):
            return array_api_compat.device(self.packed)
        return arrays.device_of(self.packed)

    @property
    def library(self) -> str:
        """Name of the array library: ``"numpy"``, ``"mlx"``, ``"torch"``, ..."""
        return arrays.library_of(self.packed)

    @property
    def nbytes(self) -> int:
        """Size of the arrays together, in bytes."""
        return sum(arrays.nbytes_of(leaf) for leaf in self._leaves())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical element, scales and biases included."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def __repr__(self) -> str:
        what = f"{self.scheme}, {self.dtype_name}"
        if self.layout != "row":
            what += f", layout {self.layout}"
        if self.transposed:
            what += ", transposed"
        try:
            shape, library = self.shape, self.library
            size = f"{self.bits_per_weight:.2f} bits/weight, {self.nbytes:,} bytes"
        except (AttributeError, TypeError, ValueError):
            return f"QuantizedTensor({what}, leaves of type {type(self.packed).__name__})"
        return f"QuantizedTensor(shape={shape}, {what}, {library} on {self.device}, {size})"

    # --- views ------------------------------------------------------------------------------------------------

    @property
    def mT(self) -> "QuantizedTensor":  # noqa: N802 (the array API's name)
        """The tensor with its last two axes swapped: a view of the same arrays."""
        view: QuantizedTensor = _new(QuantizedTensor)
        object.__setattr__(view, "packed", self.packed)
        object.__setattr__(view, "scales", self.scales)
        object.__setattr__(view, "biases", self.biases)
        object.__setattr__(view, "in_features", self.in_features)
        object.__setattr__(view, "annotation", self.annotation.flipped)
        return view

    @property
    def T(self) -> "QuantizedTensor":  # noqa: N802 (the array API's name)
        """`mT`, for a tensor with two axes."""
        if self.ndim != 2:
            raise ValueError(f"T is for tensors with 2 axes, not {self.ndim} (shape {self.shape}); use mT")
        return self.mT

    def astype(self, dtype: Any, /) -> "QuantizedTensor":
        """The same arrays, dequantizing to another dtype: float16, bfloat16 or float32."""
        name = dtype_name(dtype)
        if name not in LOGICAL_DTYPES:
            raise TypeError(f"astype: a QuantizedTensor dequantizes to {', '.join(LOGICAL_DTYPES)}, not {name}")
        return self._with(dtype=name)

    def canonical(self) -> "QuantizedTensor":
        """The tensor in layout ``"row"``; itself where it already is."""
        if self.layout == "row":
            return self
        from quantcore import ops

        return ops.canonical(self)

    def to(self, library: str, device: Any = None) -> "QuantizedTensor":
        """The tensor in another array library, packed codes staying packed.

        Parameters
        ----------
        library : str
            ``"numpy"``, ``"mlx"``, ``"torch"``, ``"array_api_strict"``, ...
        device : object, optional
            A device of that library; None for its default.

        Notes
        -----
        Arrays are shared where both libraries can, else copied.
        """
        from quantcore.transfer import to_library

        base = self.canonical()
        return base._with(leaves=tuple(to_library(leaf, library, device) for leaf in base._leaves()))

    def dequantize(self, *, dtype: Any = None) -> Any:
        """The dense weight, see :func:`quantcore.dequantize`."""
        from quantcore import ops

        return ops.dequantize(self, dtype=dtype)

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        """Index batch axes with ints and slices, and slice the ungrouped one of the last two axes."""
        base = _base_index(index, self.shape, self.transposed)
        stored = self.canonical()  # a backend's own layout may interleave rows
        return stored._with(leaves=tuple(leaf[base] for leaf in stored._leaves()))

    # --- leaves -----------------------------------------------------------------------------------------------

    def flatten(self) -> tuple[tuple[Any, ...], Callable[[Sequence[Any]], "QuantizedTensor"]]:
        """The arrays, and the function that rebuilds the tensor from such arrays (tracers, say) without validating.

        Returns
        -------
        arrays : tuple of array
            packed, scales and, where there are any, biases.
        rebuild : callable
        """
        rebuild = partial(_rebuild, self.scheme, self.in_features, self.dtype_name, self.layout, self.transposed)
        return self._leaves(), rebuild

    def _leaves(self) -> tuple[Any, ...]:
        if self.biases is None:
            return (self.packed, self.scales)
        return (self.packed, self.scales, self.biases)

    def _with(self, *, leaves: tuple[Any, ...] | None = None, dtype: str | None = None) -> "QuantizedTensor":
        note = self.annotation
        return _rebuild(
            note.scheme,
            self.in_features,
            note.dtype if dtype is None else dtype,
            note.layout,
            note.transposed,
            self._leaves() if leaves is None else leaves,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        leaves, rebuild = self.flatten()
        return (rebuild, (leaves,))

    def __copy__(self) -> "QuantizedTensor":
        return self._with()

    # --- products ---------------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        from quantcore import ops

        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        from quantcore import ops

        return ops.matmul(other, self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        from quantcore import interop

        return interop.numpy_ufunc(ufunc, method, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from quantcore import interop

        return interop.numpy_function(func, args, kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from quantcore import interop

        return interop.torch_function(func, args, kwargs or {})

    # --- what it is not ---------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return self is other  # not NotImplemented, which would hand the question to the array on the other side

    __hash__ = object.__hash__

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a QuantizedTensor is immutable; can't set {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a QuantizedTensor is immutable; can't delete {name}")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _not_an_array("be converted to a NumPy array")

    def __bool__(self) -> NoReturn:
        raise _not_an_array("be used as a truth value")

    def __len__(self) -> NoReturn:
        raise _not_an_array("be measured with len(); use .shape")

    def __iter__(self) -> NoReturn:
        raise _not_an_array("be iterated over")

    def __contains__(self, item: object) -> NoReturn:
        raise _not_an_array("be searched with 'in'")


def _activate_backends(note: Annotation, packed: Any) -> None:
    """Have the backends of a library prepare before the first tensor over its arrays reaches a trace of theirs."""
    from quantcore import registry

    registry.activate_for(packed)
    note.fresh = False


def is_quantized(obj: Any, /) -> bool:
    """Whether `obj` is a :class:`QuantizedTensor`."""
    return isinstance(obj, QuantizedTensor)


def _rebuild(
    scheme: Scheme, in_features: int, dtype: str, layout: str, transposed: bool, leaves: Sequence[Any]
) -> QuantizedTensor:
    packed, scales, *rest = leaves
    biases = rest[0] if rest else None
    return QuantizedTensor(
        packed, scales, biases, scheme, in_features, dtype=dtype, layout=layout, transposed=transposed
    )


def _default_dtype(scales: Any, biases: Any) -> str:
    name = dtype_name(scales.dtype)
    if biases is not None:
        name = result_dtype(name, dtype_name(biases.dtype))
    return name if name in LOGICAL_DTYPES else "float32"


def _not_an_array(what: str) -> TypeError:
    return TypeError(f"a QuantizedTensor is not an array and can't {what}; call .dequantize() for a dense one")


_FULL: Final = slice(None)


def _base_index(index: Any, shape: tuple[int, ...], transposed: bool) -> tuple[int | slice, ...]:
    """Index into the stored arrays that an index into the logical tensor stands for."""
    items = _expand(index if isinstance(index, tuple) else (index,), shape)
    batch, (rows, grouped) = items[:-2], (reversed(items[-2:]) if transposed else items[-2:])
    if isinstance(rows, int) or isinstance(grouped, int):
        raise IndexError(
            f"index {index!r} would leave fewer than 2 axes of shape {shape}; use a slice on the last two axes, "
            "or quantcore.take for dense rows"
        )
    grouped_length = shape[-2 if transposed else -1]
    if grouped.indices(grouped_length) != (0, grouped_length, 1):
        raise IndexError(
            f"index {index!r} cuts the grouped axis {-2 if transposed else -1} of shape {shape}, whose codes are "
            "packed together; dequantize first, or slice the other axes"
        )
    return (*batch, rows, _FULL)


def _expand(items: tuple[Any, ...], shape: tuple[int, ...]) -> list[int | slice]:
    """One checked int or slice per axis, with the ellipsis filled in."""
    if sum(item is Ellipsis for item in items) > 1:
        raise IndexError("an index can have only one ellipsis")
    if Ellipsis in [item if item is Ellipsis else None for item in items]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        filler = (_FULL,) * (len(shape) - len(items) + 1)
        items = items[:at] + filler + items[at + 1 :]
    if len(items) > len(shape):
        raise IndexError(f"{len(items)} indices for a QuantizedTensor of {len(shape)} axes, shape {shape}")
    items += (_FULL,) * (len(shape) - len(items))
    return [_checked(item, axis, length) for axis, (item, length) in enumerate(zip(items, shape, strict=True))]


def _checked(item: Any, axis: int, length: int) -> int | slice:
    if isinstance(item, slice):
        return item
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise TypeError(
            f"a QuantizedTensor takes ints and slices as indices, not {type(item).__name__}; "
            "use quantcore.take to gather rows"
        )
    try:
        position = operator.index(item)
    except TypeError:
        raise TypeError(
            "a QuantizedTensor takes ints and slices as indices, not arrays; use quantcore.take to gather rows"
        ) from None
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range for axis {axis} of length {length}")
    return position % length
