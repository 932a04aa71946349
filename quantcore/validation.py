"""Checks of a plugin at registration, and the plugin bound for dispatch.

Kernels are called directly and by position, without pluggy's multicall, which costs microseconds. So whatever only a
multicall would honour (wrappers, ordering) or reorder (partial signatures) is refused here.
"""

import inspect
import threading
from collections.abc import Callable
from typing import Any, Final

from quantcore.errors import PluginValidationError
from quantcore.hookspecs import API_VERSION, DEVIATIONS, OPTIONAL_HOOKS, REQUIRED_HOOKS, Backend, BackendInfo
from quantcore.scheme import MODES

__all__ = ["LoadedBackend", "validate"]

_HOOKS: Final = REQUIRED_HOOKS + OPTIONAL_HOOKS
_MARKER: Final = "quantcore_impl"


class LoadedBackend:
    """A validated plugin with its hooks bound.

    Attributes
    ----------
    info : BackendInfo
    plugin : object
    active : bool
        Whether the required modules have been imported and the backend has prepared.
    preparing : threading.RLock
        Held meanwhile.
    """

    __slots__ = ("_hooks", "active", "info", "plugin", "preparing")

    def __init__(self, plugin: object, info: BackendInfo, hooks: dict[str, Callable[..., Any]]) -> None:
        self.plugin = plugin
        self.info = info
        self.active = False
        self.preparing = threading.RLock()
        self._hooks = hooks

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.info.name

    def has(self, hook: str) -> bool:
        """Whether the backend implements an optional hook."""
        return hook in self._hooks

    def hook(self, name: str) -> Callable[..., Any]:
        """The implementation of a hook."""
        return self._hooks[name]

    def __repr__(self) -> str:
        return f"LoadedBackend({self.name!r})"


def validate(plugin: object) -> LoadedBackend:
    """Check a plugin against the contract and bind its hooks.

    Raises
    ------
    PluginValidationError
        Naming the plugin, the hook and what is wrong with it.
    """
    if isinstance(plugin, type):
        raise PluginValidationError(f"register an instance of {plugin.__qualname__}, not the class")
    hooks = {name: getattr(plugin, name) for name in dir(plugin) if _options(plugin, name) is not None}
    shown = _shown(plugin)
    for name in hooks:
        _check_hook(shown, plugin, name)
    missing = [name for name in REQUIRED_HOOKS if name not in hooks]
    if "prepack" in hooks and "canonical" not in hooks:
        missing.append("canonical")
    if missing:
        raise PluginValidationError(
            f"{shown} lacks the hooks {', '.join(missing)}; each needs the @quantcore.hookimpl marker"
        )
    try:
        info = hooks["backend_info"]()
    except Exception as error:
        raise PluginValidationError(f"backend_info of {shown} raised {type(error).__name__}: {error}") from error
    _check_info(shown, info)
    return LoadedBackend(plugin, info, hooks)


def _options(plugin: object, name: str) -> dict[str, Any] | None:
    if name.startswith("__"):
        return None
    try:
        options = getattr(getattr(plugin, name), _MARKER, None)
    except Exception:
        return None  # a property that raises is no hook
    return options if isinstance(options, dict) else None


def _check_hook(shown: str, plugin: object, name: str) -> None:
    if name not in _HOOKS:
        raise PluginValidationError(f"{shown} marks {name} as a hook, which isn't one; hooks: {', '.join(_HOOKS)}")
    options = _options(plugin, name) or {}
    for option in ("wrapper", "hookwrapper", "tryfirst", "trylast", "specname"):
        if options.get(option):
            raise PluginValidationError(
                f"hook {name} of {shown} is marked {option}; hooks are called directly, so this can't be honoured: "
                "use priority in BackendInfo"
            )
    wanted = list(inspect.signature(getattr(Backend, name)).parameters)[1:]
    found = list(inspect.signature(getattr(plugin, name)).parameters.values())
    kinds = {p.kind for p in found} - {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if [p.name for p in found] != wanted or kinds:
        raise PluginValidationError(
            f"hook {name} of {shown} has the signature ({', '.join(map(str, found))}); "
            f"it must be ({', '.join(wanted)}), in full and in this order"
        )


def _check_info(shown: str, info: object) -> None:
    if not isinstance(info, BackendInfo):
        raise PluginValidationError(f"backend_info of {shown} returned {type(info).__name__}, not a BackendInfo")
    if info.api_version != API_VERSION:
        raise PluginValidationError(
            f"backend {info.name!r} was written for version {info.api_version} of the hooks, this quantcore has "
            f"{API_VERSION}; install a release of the backend that fits"
        )
    for field, wanted in (("name", str), ("library", str), ("install_hint", str), ("priority", int)):
        if not isinstance(getattr(info, field), wanted):
            raise PluginValidationError(f"{field} in the BackendInfo of {shown} must be of type {wanted.__name__}")
    for field in ("array_types", "requires", "deviations", "modes"):
        value = getattr(info, field)
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise PluginValidationError(f"{field} in the BackendInfo of {shown} must be a tuple of strings")
    if not info.name or not info.library:
        raise PluginValidationError(f"name and library in the BackendInfo of {shown} can't be empty")
    if (info.library == "*") != (not info.array_types):
        raise PluginValidationError(
            f"backend {info.name!r} must list array_types, or have none and library '*' to take any array-API array"
        )
    if not all(item.count(":") == 1 for item in info.array_types):
        raise PluginValidationError(f"array_types of backend {info.name!r} must look like 'module:qualname'")
    if not info.modes or not set(info.modes) <= set(MODES):
        raise PluginValidationError(
            f"backend {info.name!r} declares the modes {', '.join(info.modes) or 'none'}; known: {', '.join(MODES)}"
        )
    unknown = [d for d in info.deviations if d.partition("@")[0] not in DEVIATIONS]
    if unknown:
        raise PluginValidationError(
            f"backend {info.name!r} declares unknown deviations {', '.join(unknown)}; known: {', '.join(DEVIATIONS)}"
        )


def _shown(plugin: object) -> str:
    name = getattr(plugin, "__name__", None)
    return str(name) if isinstance(name, str) else f"{type(plugin).__module__}.{type(plugin).__qualname__}"
