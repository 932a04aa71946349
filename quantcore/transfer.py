"""Arrays from one library to another, on request only."""

import importlib
from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from quantcore import arrays, registry
from quantcore.errors import BackendNotFoundError, BackendUnavailableError, QuantcoreError

__all__ = ["to_library"]


def to_library(array: Any, library: str, device: Any = None) -> Any:
    """The array in another library.

    Parameters
    ----------
    array : array
        Of any library that quantcore knows.
    library : str
        Name of the library to move to: ``"numpy"``, ``"mlx"``, ``"torch"``, ``"array_api_strict"``, ...
    device : object, optional
        A device of that library; None for its default.

    Returns
    -------
    array
        Sharing memory with `array` where both libraries can, else a copy. `array` itself where it is already there.

    Raises
    ------
    BackendNotFoundError, BackendUnavailableError
        If the library is unknown, or can't be imported.
    ValueError
        If it has no such device here.
    """
    if not isinstance(library, str):
        raise TypeError(f"library must be a name like 'numpy', not {type(library).__name__}")
    if not arrays.is_array(array):
        raise TypeError(f"to_library: takes an array, not {type(array).__name__}")
    if arrays.library_of(array) == library and device is None:
        return array
    return _from_numpy(_to_numpy(array), library, device)


def _to_numpy(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, np.ndarray):
        return array
    for backend in registry.snapshot().for_array(array):
        if backend.has("to_numpy"):
            return backend.hook("to_numpy")(array)  # type: ignore[no-any-return]
    return np.from_dlpack(array)


def _from_numpy(array: np.ndarray[Any, Any], library: str, device: Any) -> Any:
    unavailable = None
    for backend in registry.snapshot().ready:
        if backend.info.library == library and backend.has("from_numpy"):
            try:
                registry.activate(backend)
            except BackendUnavailableError as error:
                unavailable = error
                continue
            return _on_device(backend.hook("from_numpy"), array, library, device)
    if unavailable is not None:
        raise unavailable
    return _generic_from_numpy(array, library, device)


def _on_device(from_numpy: Callable[[Any, Any], Any], array: Any, library: str, device: Any) -> Any:
    try:
        return from_numpy(array, device)
    except QuantcoreError:
        raise
    except Exception as error:  # what a library says of a device that isn't there, torch's AssertionError among it
        if device is None:
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"can't move to {library!r} on the device {device!r}: {reason}") from error


def _generic_from_numpy(array: np.ndarray[Any, Any], library: str, device: Any) -> Any:
    record = next((r for r in registry.backends() if library and library in (r.library, r.name)), None)
    if record is not None and record.state != registry.State.READY:
        raise BackendUnavailableError(f"can't move to {library!r}: {record.reason}. {record.install_hint}".strip())
    try:
        module = importlib.import_module(library)
        namespace = array_api_compat.array_namespace(module.asarray(0.0))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        known = sorted({r.library for r in registry.backends()} - {"*", ""})
        raise BackendNotFoundError(
            f"can't move to {library!r}: no backend is for that library, and it isn't an importable array-API "
            f"namespace ({error}); known libraries: {', '.join(known)}"
        ) from None
    options = {} if device is None else {"device": device}
    try:
        return namespace.asarray(array, **options)
    except Exception as error:
        raise TypeError(f"{library} can't take an array of dtype {array.dtype}: {error}") from error
