"""From the annotation to the bound kernel, once per kind of call.

A route is resolved the first time that a combination of array type, dtypes, device, annotation and options is seen,
and kept in the table of the current registry snapshot. After that a call costs one look-up.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from quantcore import arrays, registry, settings
from quantcore.dtypes import REAL_FLOATING, dtype_name, result_dtype
from quantcore.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    NoBackendError,
    PerformanceWarning,
    UnsupportedError,
)
from quantcore.hookspecs import Call, Precision
from quantcore.scheme import Scheme
from quantcore.tensor import QuantizedTensor
from quantcore.validation import LoadedBackend

__all__ = [
    "Explanation",
    "Request",
    "Route",
    "Verdict",
    "path",
    "product_route",
    "quantize_request",
    "weigh",
    "weight_request",
]


class Route(NamedTuple):
    """A bound kernel with the options that the call resolved to."""

    function: Callable[..., Any]
    dtype: str
    precision: Precision
    marks_nonfinite: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A call, as far as the choice of its backend goes.

    Attributes
    ----------
    op : str
    array : array
        The operand whose type names the library.
    call : Call
        With its shapes.
    """

    op: str
    array: Any
    call: Call

    def __str__(self) -> str:
        call = self.call
        shapes = f"x {call.x_shape} {call.x_dtype}, " if call.x_shape is not None else ""
        flipped = ", transposed" if call.transposed else ""
        layout = "" if call.layout == "row" else f", layout {call.layout}"
        return (
            f"{self.op} of {shapes}weight {call.w_shape} {call.scheme} {call.dtype}{flipped}{layout} "
            f"in {arrays.library_of(self.array)}, precision {call.precision!r}"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one backend says to a request.

    Attributes
    ----------
    backend : str
    chosen : bool
    reason : str
        Why it isn't the chosen one; empty where it is.
    path : str
        How the chosen one computes the request, as far as it says.
    """

    backend: str
    chosen: bool
    reason: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a call goes where it goes; ``str()`` of it is for people.

    Attributes
    ----------
    request : str
        The call.
    backend : str or None
        The chosen backend, or None where the call raises.
    verdicts : tuple of Verdict
        What each backend of the library says, in the order in which they are asked.
    note : str
        Why no backend was asked, or how the choice was made.
    """

    request: str
    backend: str | None
    verdicts: tuple[Verdict, ...]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.request]
        for verdict in self.verdicts:
            mark = "→" if verdict.chosen else " "
            path = f": {verdict.path}" if verdict.path else ""
            lines.append(f" {mark} {verdict.backend}: {verdict.reason or 'computes it'}{path}")
        if self.note:
            lines.append(f"   {self.note}")
        return "\n".join(lines)


# --- the hot path ---------------------------------------------------------------------------------------------

_MAX_SHAPES: Final = 4096
_probes = arrays.probes
_settings = settings.current.get


def product_route(
    op: str, x: Any, x_shape: Any, w: QuantizedTensor, out_dtype: Any, precision: Any, backend: Any
) -> Route:
    """The kernel for a product of x with w; shapes are checked by the caller.

    Raises
    ------
    TypeError
        If x is no real floating array, or of another library or device than w.
    ValueError
        If the precision isn't one.
    NoBackendError, UnsupportedError, BackendNotFoundError, BackendUnavailableError
    """
    cls = type(x)
    probe = _probes[cls] if cls in _probes else arrays.device_probe(cls)
    device = None if probe is None else probe(x, w.packed)
    key = (op, cls, x.dtype, device, w.annotation, out_dtype, precision, backend, _settings())
    try:
        found = registry.current.routes.get(key)
    except TypeError:
        raise TypeError(f"{op}: out_dtype must be a dtype, precision and backend strings") from None
    if type(found) is Route:
        return found
    shapes = (x_shape, w.packed.shape, w.in_features)
    by_shapes: Route | None = None if found is None else found.get(shapes)
    if by_shapes is not None:
        return by_shapes
    now = registry.snapshot()
    request = product_request(op, x, w, precision, out_dtype)
    return _keep(key, shapes, request, backend, now)


def weight_route(op: str, w: QuantizedTensor, dtype: str | None, backend: str | None) -> Route:
    """The kernel for an operation on a quantized weight alone: dequantize, take."""
    key = (op, arrays.device_of(w.packed), w.annotation, dtype, backend, _settings())
    shapes = (w.packed.shape, w.in_features)
    return _kept(op, key, shapes) or _keep(key, shapes, weight_request(op, w, dtype), backend, registry.snapshot())


def quantize_route(w: Any, scheme: Scheme, backend: str | None) -> Route:
    """The kernel that quantizes a dense weight."""
    key = ("quantize", type(w), w.dtype, arrays.device_of(w), scheme, backend, _settings())
    shapes = tuple(w.shape)
    return _kept("quantize", key, shapes) or _keep(
        key, shapes, quantize_request(w, scheme), backend, registry.snapshot()
    )


def _kept(op: str, key: Any, shapes: Any) -> Route | None:
    try:
        found = registry.current.routes.get(key)
    except TypeError:
        raise TypeError(f"{op}: backend must be a string, and a dtype a dtype or its name") from None
    return found if found is None or type(found) is Route else found.get(shapes)


def _keep(key: Any, shapes: Any, request: Request, backend: str | None, now: registry.Snapshot) -> Route:
    """Resolve a request, and keep its route: by shapes only where a backend that was asked looks at them."""
    chosen, by_shape = choose(request, backend, now)
    route = Route(chosen.hook(request.op), request.call.out_dtype, request.call.precision, chosen.info.marks_nonfinite)
    if not by_shape:
        now.routes[key] = route
        return route
    table = now.routes.setdefault(key, {})
    if len(table) >= _MAX_SHAPES:
        table.clear()
    table[shapes] = route
    return route


# --- requests -------------------------------------------------------------------------------------------------


def product_request(op: str, x: Any, w: QuantizedTensor, precision: Any, out_dtype: Any = None) -> Request:
    """The request of a product, with its operands checked for kind, library and device."""
    if not arrays.is_array(x):
        raise TypeError(f"{op}: x must be an array of {w.library}, not {type(x).__name__}; convert it first")
    x_library, w_library = arrays.library_of(x), w.library
    if x_library != w_library:
        raise TypeError(
            f"{op}: x is a {x_library} array and the weight ({w.scheme}, shape {w.shape}) is in {w_library}; nothing "
            f"moves between libraries by itself: write qw.to({x_library!r}), once, or convert x"
        )
    x_device, w_device = arrays.device_of(x), arrays.device_of(w.packed)
    if x_device != w_device and None not in (x_device, w_device):
        raise TypeError(
            f"{op}: x is on {x_device} and the weight ({w.scheme}, shape {w.shape}) on {w_device}; nothing moves "
            f"between devices by itself: write qw.to({w_library!r}, x.device), once, or move x"
        )
    x_dtype = dtype_name(x.dtype)
    if x_dtype not in REAL_FLOATING:
        raise TypeError(f"{op}: x must be real floating, not {x_dtype}; cast it, e.g. to {w.dtype_name}")
    arrays.refuse_sparse(op, "x", x)
    name = product_dtype(op, x_dtype, w.dtype_name, out_dtype)
    return Request(op, x, _call(w, x_device, name, precision_in_force(op, precision), x_dtype, tuple(x.shape)))


def weight_request(op: str, w: QuantizedTensor, dtype: str | None = None, precision: Any = None) -> Request:
    """The request of an operation on a quantized weight alone; `dtype` is the result's, by default the weight's."""
    chosen = precision_in_force(op, precision)
    return Request(op, w.packed, _call(w, arrays.device_of(w.packed), dtype or w.dtype_name, chosen))


def quantize_request(w: Any, scheme: Scheme) -> Request:
    """The request of quantizing a dense weight."""
    call = Call(
        scheme=scheme,
        layout="row",
        transposed=False,
        dtype=dtype_name(w.dtype),
        x_dtype=None,
        out_dtype=dtype_name(w.dtype),
        device=arrays.device_of(w),
        precision="default",
        w_shape=tuple(w.shape),
    )
    return Request("quantize", w, call)


def _call(
    w: QuantizedTensor,
    device: str | None,
    out_dtype: str,
    precision: Precision,
    x_dtype: str | None = None,
    x_shape: tuple[int, ...] | None = None,
) -> Call:
    return Call(
        scheme=w.scheme,
        layout=w.layout,
        transposed=w.transposed,
        dtype=w.dtype_name,
        x_dtype=x_dtype,
        out_dtype=out_dtype,
        device=device,
        precision=precision,
        x_shape=x_shape,
        w_shape=w.shape,
    )


def precision_in_force(op: str, precision: Any) -> Precision:
    """The precision of a call: its own, else that of ``use_precision``, else the default."""
    if precision is None:
        return _settings().precision or "default"
    settings.check_precision(op, precision)
    return precision  # type: ignore[no-any-return]


def product_dtype(op: str, x_dtype: str, w_dtype: str, out_dtype: Any) -> str:
    """Name of a product's result dtype."""
    if out_dtype is None:
        return result_dtype(x_dtype, w_dtype)
    name = dtype_name(out_dtype)
    if name not in REAL_FLOATING:
        raise TypeError(f"{op}: out_dtype must be real floating ({', '.join(REAL_FLOATING)}), not {out_dtype!r}")
    return name


# --- the choice -----------------------------------------------------------------------------------------------


def choose(request: Request, backend: str | None, now: registry.Snapshot) -> tuple[LoadedBackend, bool]:
    """The backend that computes a request, and whether the choice rests on the shapes."""
    asked = candidates(request, backend, now)
    verdicts: list[Verdict] = []
    by_shape = False
    for candidate in asked:
        by_shape |= candidate.info.shape_dependent
        reason = weigh(candidate, request)
        if not reason:
            _warn_of_fallback(request, candidate, verdicts)
            return candidate, by_shape
        verdicts.append(Verdict(candidate.name, False, reason))
    reasons = "; ".join(f"{v.backend}: {v.reason}" for v in verdicts)
    named = backend is not None or _settings().backend is not None
    fix = (
        "leave the choice of the backend to the arrays"
        if named
        else "dequantize, or move to another library with .to()"
    )
    raise UnsupportedError(f"no backend computes this {request}. {reasons}; {fix}")


def candidates(request: Request, backend: str | None, now: registry.Snapshot) -> tuple[LoadedBackend, ...]:
    """The backends to ask, in order."""
    name = backend if backend is not None else _settings().backend
    takers = now.for_array(request.array)
    if name is not None:
        try:
            named = registry.find(name, now)
        except (BackendNotFoundError, BackendUnavailableError) as error:
            raise type(error)(f"{request}: {error}") from error
        if named not in takers:
            raise NoBackendError(
                f"{request}: backend {name!r} takes arrays of {named.info.library}, not of "
                f"{arrays.library_of(request.array)}; move the operands with .to({named.info.library!r}), or leave "
                "the choice to the arrays"
            )
        return (named,)
    if not takers:
        raise NoBackendError(
            f"{request}: no backend takes arrays of type {type(request.array).__module__}."
            f"{type(request.array).__qualname__}; {_listing()}"
        )
    return takers


def weigh(backend: LoadedBackend, request: Request) -> str:
    """Why a backend doesn't compute a request; empty where it does."""
    if not backend.has(request.op):
        return f"has no {request.op}"
    if request.call.scheme.mode not in backend.info.modes:
        return f"computes {', '.join(backend.info.modes)} weights only, not {request.call.scheme.mode}"
    try:
        registry.activate(backend)
        call = request.call if backend.info.shape_dependent else replace(request.call, x_shape=None, w_shape=None)
        answer = backend.hook("supports")(request.op, call)
    except BackendUnavailableError as error:
        return str(error)
    except Exception as error:
        return f"its supports() raised {type(error).__name__}: {error}"
    if answer is True:
        return ""
    return answer if isinstance(answer, str) and answer else "refuses, giving no reason"


def path(backend: LoadedBackend, request: Request) -> str:
    """How the backend computes a request that it supports; empty where it doesn't say."""
    if not backend.has("describe"):
        return ""
    try:
        return str(backend.hook("describe")(request.op, request.call))
    except Exception as error:
        return f"its describe() raised {type(error).__name__}: {error}"


_warned: Final[set[tuple[Any, ...]]] = set()


def _warn_of_fallback(request: Request, chosen: LoadedBackend, refused: list[Verdict]) -> None:
    if chosen.info.library != "*" or not refused:
        return
    names = tuple(verdict.backend for verdict in refused)
    key = (request.op, request.call.scheme, request.call.transposed, request.call.precision, chosen.name, names)
    if key not in _warned:
        _warned.add(key)
        reasons = "; ".join(f"{v.backend}: {v.reason}" for v in refused)
        message = f"{request} is computed by the slower backend {chosen.name!r}. {reasons}"
        warnings.warn(message, PerformanceWarning, stacklevel=_levels_to_caller())


def _levels_to_caller() -> int:
    """How many frames up the caller's own code is, so that the warning names its line."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("quantcore."):
        frame, levels = frame.f_back, levels + 1
    return levels


def _listing() -> str:
    lines = []
    for record in registry.backends():
        detail = f"{record.state}: {record.reason} {record.install_hint}".strip() if record.reason else record.state
        lines.append(f"{record.name} ({record.library or '?'}, {detail})")
    return "backends: " + ", ".join(lines) if lines else "no backend is installed"
