"""What the core asks of an array, whatever library it is of: namespace, library, device, whether it is traced."""

import sys
from collections.abc import Callable
from typing import Any, Final

import array_api_compat
import numpy as np

__all__ = [
    "device_of",
    "device_probe",
    "evaluate",
    "is_array",
    "is_traced",
    "library_of",
    "nbytes_of",
    "plain_namespace",
    "probes",
    "refuse_sparse",
]


def is_array(obj: Any) -> bool:
    """Whether `obj` is an array of a library that follows the array API.

    NumPy's masked arrays aren't: their mask would be ignored.
    """
    if type(obj).__module__.startswith("numpy.ma"):
        return False
    return bool(array_api_compat.is_array_api_obj(obj))


def plain_namespace(*arrays: Any) -> Any:
    """The array-API namespace of dense arrays, as array-api-compat gives it.

    Raises
    ------
    TypeError
        If an argument is no array, or if they belong to several libraries.
    """
    return array_api_compat.array_namespace(*arrays)


_LIBRARY: dict[type, str] = {np.ndarray: "numpy"}


def library_of(array: Any) -> str:
    """Name of the array's library: ``"numpy"``, ``"mlx"``, ``"torch"``, ``"jax"``, ..."""
    cls = type(array)
    name = _LIBRARY.get(cls)
    if name is None:
        try:
            module = str(plain_namespace(array).__name__)
        except (TypeError, AttributeError):
            module = cls.__module__
        name = module.removeprefix("array_api_compat.").partition(".")[0]
        _LIBRARY[cls] = name
    return name


def _mlx_device(*_arrays: Any) -> str:
    # MLX arrays live in unified memory; where an op runs is decided by the default device when it is built.
    mx = sys.modules["mlx.core"]
    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def _jax_platform(array: Any) -> str | None:
    # The platform alone: which devices fit together, JAX knows best, of distributed arrays above all.
    try:
        return str(next(iter(array.sharding.device_set)).platform)
    except Exception:
        return None  # tracers have none


def _jax_platforms(x: Any, w: Any) -> tuple[str | None, str | None]:
    return _jax_platform(x), _jax_platform(w)


def _torch_devices(x: Any, w: Any) -> tuple[Any, Any]:
    return x.device, getattr(w, "device", None)  # w may be of another library, which is refused later


def _own_device(array: Any) -> str | None:
    try:
        return str(array_api_compat.device(array))
    except Exception:
        return None  # tracers and shape structs have none


def _own_devices(x: Any, w: Any) -> tuple[str | None, str | None]:
    return _own_device(x), _own_device(w)


probes: Final[dict[type, Callable[[Any, Any], Any] | None]] = {np.ndarray: None}
"""What :func:`device_probe` found, by array type; dispatch reads it on its hot path."""


def device_probe(cls: type) -> Callable[[Any, Any], Any] | None:
    """The function that names the devices of two arrays of type `cls`; None where it is always the CPU."""
    try:
        return probes[cls]
    except KeyError:
        probe: Callable[[Any, Any], Any] | None
        if issubclass(cls, np.ndarray):
            probe = None
        elif cls.__module__.startswith("mlx."):
            probe = _mlx_device
        elif cls.__module__.startswith(("jax.", "jaxlib.")):
            probe = _jax_platforms
        elif cls.__module__.partition(".")[0] == "torch":
            probe = _torch_devices
        else:
            probe = _own_devices
        return probes.setdefault(cls, probe)


def device_of(array: Any) -> str | None:
    """Name of the device that the array is on, or None where that is unknown (a tracer)."""
    probe = device_probe(type(array))
    if probe is None:
        return "cpu"
    if probe is _mlx_device:
        return _mlx_device()
    return _jax_platform(array) if probe is _jax_platforms else _own_device(array)


def is_traced(array: Any) -> bool:
    """Whether the array stands for a value that isn't known yet (inside mx.compile, jax.jit, torch.compile, ...)."""
    library = library_of(array)
    if library == "mlx":
        try:
            sys.modules["mlx.core"].eval(array)
        except ValueError:
            return True
        return False
    if library == "torch":
        fakes = sys.modules.get("torch._subclasses.fake_tensor")
        return array.device.type == "meta" or (fakes is not None and bool(fakes.is_fake(array)))
    if library == "jax":
        return isinstance(array, sys.modules["jax"].core.Tracer)
    return False


def evaluate(*arrays_: Any) -> None:
    """Compute what a lazy library only noted down: MLX's streams belong to threads, and another one may read it."""
    if library_of(arrays_[0]) == "mlx":
        sys.modules["mlx.core"].eval(*arrays_)


def refuse_sparse(op: str, what: str, array: Any) -> None:
    """Raise TypeError where an array isn't one in memory, element by element: a sparse tensor of torch."""
    layout = str(getattr(array, "layout", "")) if library_of(array) == "torch" else ""
    if layout not in ("", "torch.strided"):
        raise TypeError(f"{op}: {what} {tuple(array.shape)} has the layout {layout}; call .to_dense() first")


def nbytes_of(array: Any) -> int:
    """Size of the array's elements in bytes."""
    nbytes = getattr(array, "nbytes", None)
    if nbytes is not None:
        return int(nbytes)
    itemsize = getattr(array.dtype, "itemsize", None)
    if itemsize is None:
        from quantcore.dtypes import dtype_name, numpy_dtype

        itemsize = numpy_dtype(dtype_name(array.dtype)).itemsize
    return int(array.size) * int(itemsize)
