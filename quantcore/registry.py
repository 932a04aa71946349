"""Which backends there are: entry points, registration by hand, states.

Readers take the current :class:`Snapshot`, which never changes in place but for its caches; every change of the set
of backends replaces it as a whole under a lock. A thread that resolved a route from an older snapshot writes it into
that one's table, so no stale route can reach a newer table.
"""

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any, Final

import pluggy

from quantcore import arrays, settings
from quantcore.errors import BackendNotFoundError, BackendUnavailableError, BackendWarning, PluginValidationError
from quantcore.hookspecs import Backend
from quantcore.validation import LoadedBackend, validate

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "ENTRY_POINT_GROUP",
    "BackendRecord",
    "Snapshot",
    "State",
    "activate",
    "activate_for",
    "backends",
    "find",
    "refresh",
    "register",
    "snapshot",
    "unregister",
    "use_backend",
]

ENTRY_POINT_GROUP: Final = "quantcore.backends"


class State(StrEnum):
    """What can be done with an installed backend."""

    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"
    BROKEN = "BROKEN"
    DISABLED = "DISABLED"


@dataclass(frozen=True, slots=True)
class BackendRecord:
    """One line of :func:`backends`.

    Attributes
    ----------
    name : str
    state : State
        READY; UNAVAILABLE: what it requires isn't installed; BROKEN: the plugin itself fails;
        DISABLED: named in ``QUANTCORE_DISABLE``.
    reason : str
        Why it isn't READY.
    install_hint : str
        What to type to make an UNAVAILABLE one READY.
    library : str
        Its array library; ``"*"`` for any, empty where the plugin couldn't be asked.
    priority : int
    origin : str
        The distribution and entry point that it came from, or ``"register()"``.
    exception : Exception or None
        What a BROKEN plugin raised.
    """

    name: str
    state: State
    reason: str = ""
    install_hint: str = ""
    library: str = ""
    priority: int = 0
    origin: str = ""
    exception: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The backends at one moment, with the routes that dispatch resolved from them.

    Attributes
    ----------
    records : mapping of str to BackendRecord
    ready : tuple of LoadedBackend
        By falling priority, then by name.
    routes : dict
        Dispatch's table; filled as calls come.
    """

    records: Mapping[str, BackendRecord] = field(default_factory=dict)
    ready: tuple[LoadedBackend, ...] = ()
    routes: dict[Any, Any] = field(default_factory=dict)
    _by_type: dict[type, tuple[LoadedBackend, ...]] = field(default_factory=dict)

    def for_array(self, array: Any) -> tuple[LoadedBackend, ...]:
        """The backends that take arrays of this array's type, by falling priority."""
        cls = type(array)
        found = self._by_type.get(cls)
        if found is None:
            found = tuple(backend for backend in self.ready if _takes(backend, array))
            self._by_type[cls] = found
        return found


current = Snapshot()
"""The snapshot in force; empty before first use. Read it through :func:`snapshot`, or on the hot path as it is."""

_lock: Final = threading.RLock()
_registered: Final[dict[str, LoadedBackend]] = {}
_manager = pluggy.PluginManager("quantcore")
_manager.add_hookspecs(Backend)
_phase = "new"


def snapshot() -> Snapshot:
    """The current snapshot; the first call reads the entry points."""
    if _phase != "loaded":
        with _lock:
            if _phase == "new":
                _reload()
    return current


def backends() -> list[BackendRecord]:
    """Every installed or registered backend with its state, READY ones first, by falling priority.

    Returns
    -------
    list of BackendRecord
    """
    records = snapshot().records.values()
    return sorted(records, key=lambda r: (r.state is not State.READY, -r.priority, r.name))


def register(plugin: object) -> str:
    """Add a backend to this process; the next call already sees it.

    Parameters
    ----------
    plugin : object
        An instance or a module with the hooks of :class:`quantcore.hookspecs.Backend`.

    Returns
    -------
    str
        The backend's name.

    Raises
    ------
    PluginValidationError
        If the plugin doesn't keep the contract, or if a backend of its name is there already. Nothing has changed
        then.
    """
    backend = validate(plugin)
    with _lock:
        held = snapshot().records.get(backend.name)
        if held is not None and held.state in (State.READY, State.UNAVAILABLE):
            raise PluginValidationError(
                f"a backend named {backend.name!r} is there already ({held.origin}); unregister it first"
            )
        _hold(backend)
        _registered[backend.name] = backend
        _publish(_record(backend, "register()"), backend)
    return backend.name


def unregister(name: str) -> None:
    """Remove a backend from this process, whether registered or installed; :func:`refresh` brings installed ones back.

    Parameters
    ----------
    name : str

    Raises
    ------
    BackendNotFoundError
        If there is none of that name.
    """
    global current
    with _lock:
        now = snapshot()
        if name not in now.records:
            raise _not_found(name)
        _drop(name)
        _registered.pop(name, None)
        current = Snapshot(
            records={n: r for n, r in now.records.items() if n != name},
            ready=tuple(backend for backend in now.ready if backend.name != name),
        )


def refresh() -> None:
    """Read the entry points anew: backends installed since, or whose framework was, become READY."""
    importlib.invalidate_caches()
    with _lock:
        _reload()


def find(name: str, now: Snapshot | None = None) -> LoadedBackend:
    """The READY backend of that name, with its framework imported; of the snapshot `now`, or of the current one.

    Raises
    ------
    BackendNotFoundError, BackendUnavailableError
    """
    now = snapshot() if now is None else now
    for backend in now.ready:
        if backend.name == name:
            activate(backend)
            return backend
    record = now.records.get(name) if isinstance(name, str) else None
    if record is None:
        raise _not_found(name)
    raise _unavailable(record)


def activate(backend: LoadedBackend) -> None:
    """Import what the backend requires and let it prepare, the first time it is used.

    Raises
    ------
    BackendUnavailableError
        If a required module fails at import, or the backend at preparing; it is UNAVAILABLE from then on.
    """
    if backend.active:
        return
    with backend.preparing:  # so that no other thread uses it half prepared
        if backend.active:
            return
        for module in backend.info.requires:
            try:
                importlib.import_module(module)
            except Exception as error:
                raise _failed(backend, f"importing {module}", error) from error
        if backend.has("prepare"):
            try:
                backend.hook("prepare")()
            except Exception as error:
                raise _failed(backend, "its prepare()", error) from error
        backend.active = True


def activate_for(array: Any) -> None:
    """Activate the backends that take arrays of this array's type, as far as they can be; once a type."""
    now = snapshot()
    if _phase != "loaded":
        return  # a plugin that makes tensors while it is loaded
    for backend in now.for_array(array):
        with suppress(BackendUnavailableError):
            activate(backend)


def _failed(backend: LoadedBackend, what: str, error: Exception) -> BackendUnavailableError:
    record = replace(
        _record(backend, ""),
        state=State.UNAVAILABLE,
        reason=f"{what} failed: {type(error).__name__}: {error}",
        exception=error,
    )
    _demote(backend, record)
    return _unavailable(record)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Calls inside the ``with`` block that name no backend of their own use this one.

    Parameters
    ----------
    name : str
        A backend of the array library that the calls are made in: nothing moves data between libraries.

    Raises
    ------
    BackendNotFoundError, BackendUnavailableError
    """
    find(name)
    token = settings.current.set(settings.Settings.of(name, settings.current.get().precision))
    try:
        yield
    finally:
        settings.current.reset(token)


# --- loading --------------------------------------------------------------------------------------------------


def entry_points(*, group: str) -> "Iterable[EntryPoint]":
    """The installed entry points of a group; the import costs 20 ms, which `import quantcore` shall not."""
    from importlib.metadata import entry_points as installed

    return installed(group=group)


def _reload() -> None:
    global current, _phase
    _phase = "loading"
    try:
        records: dict[str, BackendRecord] = {}
        ready: dict[str, LoadedBackend] = {}
        for name, _ in list(_manager.list_name_plugin()):
            if name not in _registered:
                _drop(name)
        for backend in _registered.values():
            _add(records, ready, _record(backend, "register()"), backend)
        disabled = _disabled()
        entries = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value))
        for entry in entries:
            if entry.name in disabled:
                if entry.name in records:
                    continue  # registered by hand under that name
                record = BackendRecord(
                    entry.name, State.DISABLED, reason="named in QUANTCORE_DISABLE", origin=_origin(entry)
                )
                _add(records, ready, record, None)
            else:
                _add(records, ready, *_load(entry, records))
        current = Snapshot(records=records, ready=_ordered(ready.values()))
        _phase = "loaded"
    finally:
        if _phase == "loading":
            _phase = "new"


def _load(entry: "EntryPoint", records: Mapping[str, BackendRecord]) -> tuple[BackendRecord, LoadedBackend | None]:
    origin = _origin(entry)
    try:
        loaded = entry.load()
        backend = validate(loaded() if isinstance(loaded, type) else loaded)
        if backend.name != entry.name:
            raise PluginValidationError(
                f"its entry point is named {entry.name!r}, its backend_info says {backend.name!r}; they must agree, "
                "since QUANTCORE_DISABLE goes by the entry point"
            )
        if backend.name in records:
            raise PluginValidationError(
                f"its name {backend.name!r} is taken by {records[backend.name].origin}; one of them must go"
            )
        _hold(backend)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the quantcore backend {entry.name!r} of {origin} is broken and left out: {reason}",
            BackendWarning,
            stacklevel=2,
        )
        name = entry.name if entry.name not in records else f"{entry.name} ({origin})"
        return BackendRecord(name, State.BROKEN, reason=reason, origin=origin, exception=error), None
    return _record(backend, origin), backend


def _record(backend: LoadedBackend, origin: str) -> BackendRecord:
    info = backend.info
    missing = [module for module in info.requires if not _findable(module)]
    return BackendRecord(
        info.name,
        State.UNAVAILABLE if missing else State.READY,
        reason=f"not installed: {', '.join(missing)}" if missing else "",
        install_hint=info.install_hint,
        library=info.library,
        priority=info.priority,
        origin=origin,
    )


def _add(
    records: dict[str, BackendRecord],
    ready: dict[str, LoadedBackend],
    record: BackendRecord,
    backend: LoadedBackend | None,
) -> None:
    records[record.name] = record
    if backend is not None and record.state is State.READY:
        ready[record.name] = backend


def _publish(record: BackendRecord, backend: LoadedBackend) -> None:
    global current
    records = dict(current.records)
    ready = {b.name: b for b in current.ready}
    _add(records, ready, record, backend)
    current = Snapshot(records=records, ready=_ordered(ready.values()))


def _demote(backend: LoadedBackend, record: BackendRecord) -> None:
    global current
    with _lock:
        held = current.records.get(backend.name)
        if held is None or held.state is not State.READY:
            return
        current = Snapshot(
            records={**current.records, backend.name: replace(record, origin=held.origin)},
            ready=tuple(b for b in current.ready if b is not backend),
        )


def _hold(backend: LoadedBackend) -> None:
    try:
        _manager.register(backend.plugin, backend.name)
    except (ValueError, pluggy.PluginValidationError) as error:
        raise PluginValidationError(f"pluggy refused backend {backend.name!r}: {error}") from error


def _drop(name: str) -> None:
    if _manager.has_plugin(name):
        _manager.unregister(name=name)


def _ordered(ready: Any) -> tuple[LoadedBackend, ...]:
    return tuple(sorted(ready, key=lambda b: (-b.info.priority, b.name)))


def _disabled() -> frozenset[str]:
    return frozenset(filter(None, (n.strip() for n in os.environ.get("QUANTCORE_DISABLE", "").split(","))))


def _origin(entry: "EntryPoint") -> str:
    distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"
    return f"{distribution} ({entry.value})"


# --- modules and types ----------------------------------------------------------------------------------------


def _findable(module: str) -> bool:
    """Whether a module can be found, without importing it or its parents."""
    if module in sys.modules:
        return sys.modules[module] is not None
    root, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(root)
        for depth in range(len(rest)):
            if spec is None or spec.submodule_search_locations is None:
                return False
            name = ".".join([root, *rest[: depth + 1]])
            spec = _find_in(name, spec)
    except (ImportError, ValueError):
        return False
    return spec is not None


def _find_in(name: str, parent: ModuleSpec) -> ModuleSpec | None:
    return PathFinder.find_spec(name, list(parent.submodule_search_locations or ()))


def _takes(backend: LoadedBackend, array: Any) -> bool:
    if backend.info.library == "*":
        return arrays.is_array(array)
    return any(isinstance(array, known) for known in map(_loaded_type, backend.info.array_types) if known)


def _loaded_type(name: str) -> type | None:
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


# --- errors ---------------------------------------------------------------------------------------------------


def _not_found(name: object) -> BackendNotFoundError:
    known = ", ".join(sorted(snapshot().records)) or "none"
    return BackendNotFoundError(f"no backend is named {name!r}; installed or registered: {known}")


def _unavailable(record: BackendRecord) -> BackendUnavailableError:
    hint = f"; {record.install_hint}" if record.install_hint else ""
    return BackendUnavailableError(f"backend {record.name!r} is {record.state}: {record.reason}{hint}")
