"""Which backends there are: entry points, states, registration by hand, validation, and what is imported when."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pluggy
import pytest

import quantcore as qc
from quantcore import BackendInfo, Call, State, registry
from quantcore.hookspecs import API_VERSION, OPTIONAL_HOOKS, REQUIRED_HOOKS

Array = np.ndarray[Any, Any]

X = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
QW = qc.quantize(np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32))
INFO = BackendInfo(api_version=1, name="toy", library="numpy", array_types=("numpy:ndarray",))


class Toy:
    """A backend that lets NumPy's compute, and says what it is told to say."""

    def __init__(self, info: Any = INFO, **change: Any) -> None:
        self.info = replace(info, **change) if change else info

    @qc.hookimpl
    def backend_info(self) -> BackendInfo:
        return self.info  # type: ignore[no-any-return]

    @qc.hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        return True

    @qc.hookimpl
    def quantize(self, w: Array, scheme: qc.Scheme) -> tuple[Array, Array, Array]:
        return qc.quantize(w, scheme, backend="numpy").flatten()[0]  # type: ignore[return-value]

    @qc.hookimpl
    def dequantize(self, qw: qc.QuantizedTensor, dtype: str) -> Array:
        return np.asarray(qc.dequantize(qw, backend="numpy"))

    @qc.hookimpl
    def dot(self, x: Array, qw: qc.QuantizedTensor, dtype: str, precision: str) -> Array:
        return np.asarray(qc.dot(x, qw, backend="numpy"))


class Entry:
    """An entry point: a name, where it points, and what loading it gives or raises."""

    def __init__(self, name: str, loaded: Any, value: str = "somewhere:backend") -> None:
        self.name, self.value, self.loaded = name, value, loaded
        self.dist = SimpleNamespace(name="some-distribution", version="1.2")
        self.loads = 0

    def load(self) -> Any:
        self.loads += 1
        if isinstance(self.loaded, BaseException):
            raise self.loaded
        return self.loaded


def install(patch: pytest.MonkeyPatch, *entries: Entry) -> list[str]:
    """Put entry points beside the real ones; the groups that were read are noted in the list."""
    real = list(registry.entry_points(group=registry.ENTRY_POINT_GROUP))
    read: list[str] = []

    def entry_points(*, group: str) -> list[Any]:
        read.append(group)
        return [*entries, *real]

    patch.setattr(registry, "entry_points", entry_points)
    patch.setattr(registry, "_phase", "new")
    return read


def record(name: str) -> qc.BackendRecord:
    (found,) = [r for r in qc.backends() if r.name == name]
    return found


# --- the real ones --------------------------------------------------------------------------------------------


def test_the_project_s_own_backends_are_entry_points() -> None:
    found = {r.name: r for r in qc.backends()}
    assert {"array_api", "mlx", "numpy"} <= set(found)
    for name in ("array_api", "mlx", "numpy"):
        assert found[name].state is State.READY
        assert f"quantcore_backends.{name}_backend:backend" in found[name].origin
        assert "quantcore-arrays" in found[name].origin
        assert found[name].exception is None
    assert found["array_api"].library == "*"
    assert found["mlx"].install_hint


def test_backends_are_listed_ready_first_by_falling_priority(spoil: pytest.MonkeyPatch) -> None:
    install(spoil, Entry("aaa", RuntimeError("broken")))
    with pytest.warns(qc.BackendWarning, match="'aaa'"):
        qc.register(Toy(priority=5))
    listed = [r for r in qc.backends() if r.name in ("aaa", "mlx", "numpy", "toy", "array_api")]
    assert [r.name for r in listed] == ["mlx", "toy", "numpy", "array_api", "aaa"]


def test_state_prints_as_its_name() -> None:
    assert [str(state) for state in State] == ["READY", "UNAVAILABLE", "BROKEN", "DISABLED"]


# --- entry points ---------------------------------------------------------------------------------------------


def test_entry_points_are_read_once_and_lazily(spoil: pytest.MonkeyPatch) -> None:
    entry = Entry("toy", Toy())
    read = install(spoil, entry)
    assert read == []
    assert qc.is_quantized(QW)  # what needs no backend reads none
    assert QW.shape == (5, 64)
    assert read == []
    qc.dot(X, QW, precision="highest")  # may still have a route from before
    qc.backends()
    qc.dot(X, QW)
    qc.explain("dot", X, QW)
    assert read == [registry.ENTRY_POINT_GROUP]
    assert entry.loads == 1
    assert record("toy").state is State.READY
    assert record("toy").origin == "some-distribution 1.2 (somewhere:backend)"
    qc.refresh()
    assert entry.loads == 2


def test_a_class_as_an_entry_point_is_instantiated(spoil: pytest.MonkeyPatch) -> None:
    install(spoil, Entry("toy", Toy))
    assert record("toy").state is State.READY


def test_a_module_as_an_entry_point(spoil: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy_module")
    toy = Toy()
    for hook in REQUIRED_HOOKS:
        setattr(module, hook, getattr(toy, hook))
    install(spoil, Entry("toy", module))
    np.testing.assert_array_equal(qc.dot(X, QW, backend="toy"), qc.dot(X, QW))


BREAKAGES = [
    ImportError("no such symbol"),
    RuntimeError("at import"),
    SyntaxError("bad plugin"),
    SystemExit(3),
    object(),
    Toy(info=None),
    Toy(api_version=API_VERSION + 1),
    Toy(name="numpy"),
]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda b: type(b).__name__)
def test_a_broken_plugin_warns_once_and_harms_nobody(spoil: pytest.MonkeyPatch, breakage: Any, close: Any) -> None:
    install(spoil, Entry("bad", breakage), Entry("toy", Toy()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qc.refresh()
        qc.backends()
        result = qc.dot(X, QW)
        other = qc.dot(X, QW, backend="toy")
    told = [w for w in caught if issubclass(w.category, qc.BackendWarning)]
    assert len(told) == 1
    assert "'bad'" in str(told[0].message)
    assert "some-distribution 1.2" in str(told[0].message)
    np.testing.assert_array_equal(result, other)
    close(result, X @ QW.dequantize().T)
    bad = record("bad")
    assert bad.state is State.BROKEN
    assert bad.exception is not None
    if isinstance(breakage, BaseException):
        assert bad.exception is breakage
        assert str(breakage) in bad.reason
    assert type(bad.exception).__name__ in bad.reason
    for name in ("toy", "numpy", "mlx", "array_api"):
        assert record(name).state is State.READY
    with pytest.raises(qc.BackendUnavailableError, match=r"'bad' is BROKEN"):
        qc.dot(X, QW, backend="bad")


def test_each_broken_plugin_has_its_own_warning(spoil: pytest.MonkeyPatch) -> None:
    install(spoil, Entry("bad", RuntimeError("one")), Entry("worse", RuntimeError("two")))
    with pytest.warns(qc.BackendWarning) as told:
        qc.refresh()
    assert sorted(str(w.message)[-3:] for w in told) == ["one", "two"]


def test_a_keyboard_interrupt_is_no_breakage_and_the_next_use_loads(spoil: pytest.MonkeyPatch) -> None:
    entry = Entry("toy", KeyboardInterrupt())
    install(spoil, entry)
    with pytest.raises(KeyboardInterrupt):
        qc.backends()
    entry.loaded = Toy()
    assert record("toy").state is State.READY
    assert record("numpy").state is State.READY


def test_two_entry_points_of_one_name(spoil: pytest.MonkeyPatch) -> None:
    install(spoil, Entry("toy", Toy(), "a:backend"), Entry("toy", Toy(), "b:backend"))
    with pytest.warns(qc.BackendWarning, match=r"'toy' is taken by some-distribution 1\.2 \(a:backend\)"):
        qc.refresh()
    assert record("toy").origin.endswith("(a:backend)")
    assert record("toy").state is State.READY
    (other,) = [r for r in qc.backends() if r.state is State.BROKEN]
    assert "b:backend" in other.name


def test_one_object_under_two_entry_points(spoil: pytest.MonkeyPatch) -> None:
    toy = Toy()
    install(spoil, Entry("toy", toy), Entry("toy2", toy))
    with pytest.warns(qc.BackendWarning, match="toy2"):
        qc.refresh()
    assert record("toy").state is State.READY


# --- states ---------------------------------------------------------------------------------------------------


def test_unavailable_where_a_required_module_is_missing(spoil: pytest.MonkeyPatch) -> None:
    toy = Toy(requires=("no_such_framework", "numpy"), install_hint="pip install no-such-framework")
    install(spoil, Entry("toy", toy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # silently
        qc.refresh()
        found = record("toy")
    assert found.state is State.UNAVAILABLE
    assert "no_such_framework" in found.reason
    assert "numpy" not in found.reason
    assert found.install_hint == "pip install no-such-framework"
    with pytest.raises(qc.BackendUnavailableError, match=r"UNAVAILABLE.*no_such_framework.*pip install"):
        qc.dot(X, QW, backend="toy")
    assert qc.explain("dot", X, QW).backend == "numpy"


@pytest.mark.parametrize(
    ("module", "state"),
    [
        ("json", State.READY),
        ("xml.dom.minidom", State.READY),
        ("xml.no_such", State.UNAVAILABLE),
        ("json.decoder.JSONDecoder", State.UNAVAILABLE),
        ("no_such.sub", State.UNAVAILABLE),
    ],
)
def test_required_modules_are_looked_up_and_not_imported(spoil: pytest.MonkeyPatch, module: str, state: State) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "xml"]:
        spoil.delitem(sys.modules, name)
    qc.register(Toy(requires=(module,)))
    assert record("toy").state is state
    assert "xml.dom.minidom" not in sys.modules


def test_a_framework_that_is_found_and_fails_at_import(spoil: pytest.MonkeyPatch, tmp_path: Any, close: Any) -> None:
    (tmp_path / "hollow_framework.py").write_text("raise ImportError('libhollow.so: cannot open shared object file')")
    spoil.syspath_prepend(str(tmp_path))
    qc.register(Toy(priority=50, requires=("hollow_framework",), install_hint="pip install hollow[cpu]"))
    assert record("toy").state is State.READY  # it is there, as far as one can see without importing it
    result = qc.dot(X, QW)  # the first use finds out, and the next backend computes it
    close(result, X @ QW.dequantize().T)
    found = record("toy")
    assert found.state is State.UNAVAILABLE
    assert "hollow_framework" in found.reason
    assert "libhollow.so" in found.reason
    assert found.install_hint == "pip install hollow[cpu]"
    assert isinstance(found.exception, ImportError)
    with pytest.raises(qc.BackendUnavailableError, match=r"UNAVAILABLE.*libhollow.*pip install hollow\[cpu\]"):
        qc.dot(X, QW, backend="toy")
    with pytest.raises(qc.BackendUnavailableError, match="hollow"), qc.use_backend("toy"):
        pytest.fail("entered")


def test_named_outright_such_a_framework_raises_at_once(spoil: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "hollow_again.py").write_text("1 / 0")
    spoil.syspath_prepend(str(tmp_path))
    qc.register(Toy(requires=("hollow_again",), install_hint="pip install hollow"))
    with pytest.raises(
        qc.BackendUnavailableError, match=r"hollow_again.*ZeroDivisionError.*pip install hollow"
    ) as caught:
        qc.dot(X, QW, backend="toy")
    assert isinstance(caught.value, ImportError)
    assert qc.explain("dot", X, QW).backend == "numpy"


def test_refresh_makes_an_installed_framework_ready(spoil: pytest.MonkeyPatch, tmp_path: Any) -> None:
    spoil.syspath_prepend(str(tmp_path))
    install(spoil, Entry("toy", Toy(requires=("late_framework",))))
    assert record("toy").state is State.UNAVAILABLE
    (tmp_path / "late_framework.py").write_text("")
    assert record("toy").state is State.UNAVAILABLE
    qc.refresh()
    assert record("toy").state is State.READY
    qc.dot(X, QW, backend="toy")
    assert "late_framework" in sys.modules
    del sys.modules["late_framework"]


@pytest.mark.parametrize("value", ["toy", " toy ", "other,toy", "toy,,"])
def test_disabled_plugins_are_not_even_loaded(spoil: pytest.MonkeyPatch, value: str) -> None:
    entry = Entry("toy", RuntimeError("would warn"))
    install(spoil, entry)
    spoil.setenv("QUANTCORE_DISABLE", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qc.refresh()
    assert entry.loads == 0
    assert record("toy").state is State.DISABLED
    assert "QUANTCORE_DISABLE" in record("toy").reason
    with pytest.raises(qc.BackendUnavailableError, match=r"'toy' is DISABLED.*QUANTCORE_DISABLE"):
        qc.dot(X, QW, backend="toy")


def test_what_is_disabled_may_be_registered_by_hand(spoil: pytest.MonkeyPatch) -> None:
    install(spoil, Entry("toy", Toy()))
    spoil.setenv("QUANTCORE_DISABLE", "toy")
    assert record("toy").state is State.DISABLED
    assert qc.register(Toy()) == "toy"
    for _ in range(2):
        assert record("toy").state is State.READY
        assert record("toy").origin == "register()"
        assert qc.explain("dot", X, QW, backend="toy").backend == "toy"
        qc.refresh()


def test_a_disabled_library_falls_back_to_the_array_api(spoil: pytest.MonkeyPatch, close: Any) -> None:
    expected = qc.dot(X, QW)
    spoil.setenv("QUANTCORE_DISABLE", "numpy")
    qc.refresh()
    assert qc.explain("dot", X, QW).backend == "array_api"
    close(qc.dot(X, QW), expected)


# --- by hand --------------------------------------------------------------------------------------------------


def test_register_and_unregister(spoil: pytest.MonkeyPatch) -> None:
    assert qc.register(Toy()) == "toy"
    assert record("toy").origin == "register()"
    np.testing.assert_array_equal(qc.dot(X, QW, backend="toy"), qc.dot(X, QW))
    qc.unregister("toy")
    assert "toy" not in [r.name for r in qc.backends()]
    with pytest.raises(qc.BackendNotFoundError, match="'toy'"):
        qc.dot(X, QW, backend="toy")
    assert qc.register(Toy()) == "toy"


def test_names_are_unique_and_a_conflict_changes_nothing(spoil: pytest.MonkeyPatch) -> None:
    first = Toy()
    qc.register(first)
    before = qc.backends()
    with pytest.raises(qc.PluginValidationError, match=r"'toy' is there already.*register\(\).*unregister"):
        qc.register(Toy())
    with pytest.raises(qc.PluginValidationError, match=r"'numpy' is there already.*quantcore-arrays"):
        qc.register(Toy(name="numpy"))
    assert qc.backends() == before


def test_one_object_registers_once_under_whatever_name(spoil: pytest.MonkeyPatch) -> None:
    toy = Toy()
    qc.register(toy)
    toy.info = replace(INFO, name="toy2")
    with pytest.raises(qc.PluginValidationError, match="toy2"):
        qc.register(toy)
    assert "toy2" not in [r.name for r in qc.backends()]


def test_a_broken_one_may_be_replaced_by_hand(spoil: pytest.MonkeyPatch) -> None:
    install(spoil, Entry("toy", RuntimeError("broken")))
    with pytest.warns(qc.BackendWarning):
        qc.refresh()
    qc.register(Toy())
    assert record("toy").state is State.READY


def test_registered_ones_survive_a_refresh(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Toy())
    qc.refresh()
    assert record("toy").state is State.READY
    qc.dot(X, QW, backend="toy")


def test_an_unregistered_installed_one_comes_back_by_refresh(spoil: pytest.MonkeyPatch) -> None:
    qc.unregister("numpy")
    assert "numpy" not in [r.name for r in qc.backends()]
    assert qc.explain("dot", X, QW).backend == "array_api"
    qc.refresh()
    assert qc.explain("dot", X, QW).backend == "numpy"


def test_registration_by_hand_reads_the_entry_points_first(spoil: pytest.MonkeyPatch) -> None:
    install(spoil, Entry("toy", Toy()))
    with pytest.raises(qc.PluginValidationError, match="'toy' is there already"):
        qc.register(Toy())


# --- validation -----------------------------------------------------------------------------------------------

wrapper = pluggy.HookimplMarker("quantcore")


def spoiled(**methods: Any) -> Toy:
    return type("Spoiled", (Toy,), methods)()  # type: ignore[no-any-return]


def without(name: str) -> Toy:
    return spoiled(**{name: lambda self: None})


@qc.hookimpl
def _short(self: Any, x: Any, qw: Any, dtype: Any) -> None: ...
@qc.hookimpl
def _renamed(self: Any, a: Any, qw: Any, dtype: Any, precision: Any) -> None: ...
@qc.hookimpl
def _reordered(self: Any, qw: Any, x: Any, dtype: Any, precision: Any) -> None: ...
@qc.hookimpl
def _longer(self: Any, x: Any, qw: Any, dtype: Any, precision: Any, more: Any = None) -> None: ...
@qc.hookimpl
def _starred(self: Any, x: Any, qw: Any, dtype: Any, *precision: Any) -> None: ...
@qc.hookimpl
def _keyword_only(self: Any, x: Any, qw: Any, dtype: Any, *, precision: Any) -> None: ...
@qc.hookimpl
def _positional_only(self: Any, x: Any, qw: Any, dtype: Any, precision: Any, /) -> None: ...
@qc.hookimpl
def _anything(self: Any, qw: Any) -> None: ...
@qc.hookimpl(tryfirst=True)
def _first(self: Any, x: Any, qw: Any, dtype: Any, precision: Any) -> None: ...
@qc.hookimpl(trylast=True)
def _last(self: Any, x: Any, qw: Any, dtype: Any, precision: Any) -> None: ...
@qc.hookimpl(wrapper=True)
def _wrapper(self: Any, x: Any, qw: Any, dtype: Any, precision: Any) -> Any:
    return (yield)


@qc.hookimpl(hookwrapper=True)
def _hookwrapper(self: Any, x: Any, qw: Any, dtype: Any, precision: Any) -> Any:
    yield


@qc.hookimpl(specname="dot")
def _other_name(self: Any, x: Any, qw: Any, dtype: Any, precision: Any) -> None: ...
@qc.hookimpl
def _raises(self: Any) -> BackendInfo:
    raise KeyError("no info today")


INVALID: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
    ("class", lambda: Toy, ("instance", "Toy")),
    ("no hooks", object, (*REQUIRED_HOOKS, "hookimpl")),
    *((f"lacks {hook}", lambda hook=hook: without(hook), (hook, "hookimpl", "Spoiled")) for hook in REQUIRED_HOOKS),
    ("too few arguments", lambda: spoiled(dot=_short), ("dot", "Spoiled", "(x, qw, dtype, precision)")),
    ("renamed argument", lambda: spoiled(dot=_renamed), ("dot", "(x, qw, dtype, precision)", "order")),
    ("reordered arguments", lambda: spoiled(dot=_reordered), ("dot", "(x, qw, dtype, precision)", "order")),
    ("another argument", lambda: spoiled(dot=_longer), ("dot", "more", "in full")),
    ("starred", lambda: spoiled(dot=_starred), ("dot", "*precision")),
    ("keyword only", lambda: spoiled(dot=_keyword_only), ("dot", "precision")),
    ("positional only", lambda: spoiled(dot=_positional_only), ("dot", "precision")),
    ("optional hook's signature", lambda: spoiled(take=_anything), ("take", "(qw, indices, axis, dtype)")),
    ("unknown hook", lambda: spoiled(matmul=_anything), ("matmul", "isn't one", "gather_dot")),
    ("prepack without canonical", lambda: spoiled(prepack=_anything), ("canonical",)),
    ("tryfirst", lambda: spoiled(dot=_first), ("dot", "tryfirst", "priority")),
    ("trylast", lambda: spoiled(dot=_last), ("dot", "trylast", "priority")),
    ("wrapper", lambda: spoiled(dot=_wrapper), ("dot", "wrapper", "priority")),
    ("hookwrapper", lambda: spoiled(dot=_hookwrapper), ("dot", "hookwrapper", "priority")),
    ("specname", lambda: spoiled(take=_other_name), ("take", "specname")),
    ("backend_info raises", lambda: spoiled(backend_info=_raises), ("backend_info", "KeyError", "no info today")),
    ("backend_info of None", lambda: Toy(info=None), ("backend_info", "NoneType", "BackendInfo")),
    ("backend_info of a dict", lambda: Toy(info={"name": "toy"}), ("backend_info", "dict", "BackendInfo")),
    ("older API", lambda: Toy(api_version=0), ("'toy'", "version 0", str(API_VERSION))),
    ("newer API", lambda: Toy(api_version=API_VERSION + 1), ("'toy'", f"version {API_VERSION + 1}", "release")),
    ("name of another type", lambda: Toy(name=3), ("name", "str")),
    ("empty name", lambda: Toy(name=""), ("name", "empty")),
    ("empty library", lambda: Toy(library=""), ("library", "empty")),
    ("library of another type", lambda: Toy(library=np), ("library", "str")),
    ("hint of another type", lambda: Toy(install_hint=None), ("install_hint", "str")),
    ("priority of another type", lambda: Toy(priority="high"), ("priority", "int")),
    ("array_types as a string", lambda: Toy(array_types="numpy:ndarray"), ("array_types", "tuple of strings")),
    ("array_types as types", lambda: Toy(array_types=(np.ndarray,)), ("array_types", "tuple of strings")),
    ("array_types unreadable", lambda: Toy(array_types=("numpy.ndarray",)), ("array_types", "'module:qualname'")),
    ("no array_types", lambda: Toy(array_types=()), ("array_types", "'*'")),
    ("array_types of any library", lambda: Toy(library="*"), ("array_types", "'*'")),
    ("requires as a string", lambda: Toy(requires="numpy"), ("requires", "tuple of strings")),
    ("deviations as a list", lambda: Toy(deviations=["half-weight"]), ("deviations", "tuple of strings")),
    ("unknown deviation", lambda: Toy(deviations=("wrong@gpu",)), ("wrong@gpu", "dequantize-fma")),
]


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID])
def test_validation(spoil: pytest.MonkeyPatch, make: Callable[[], Any], words: tuple[str, ...]) -> None:
    before = qc.backends()
    with pytest.raises(qc.PluginValidationError) as caught:
        qc.register(make())
    assert isinstance(caught.value, TypeError)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert qc.backends() == before  # registration is atomic


def test_a_property_that_raises_is_no_hook(spoil: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> Any:
        raise RuntimeError

    assert qc.register(spoiled(shy=property(fail))) == "toy"


def test_every_optional_hook_may_be_left_out() -> None:
    assert not any(hasattr(Toy(), hook) for hook in OPTIONAL_HOOKS)


class Preparing(Toy):
    """A toy that notes when it is prepared."""

    def __init__(self, error: Exception | None = None, **change: Any) -> None:
        super().__init__(**change)
        self.noted: list[str] = []
        self.error = error

    @qc.hookimpl
    def prepare(self) -> None:
        self.noted.append("prepared")
        if self.error is not None:
            raise self.error

    @qc.hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        self.noted.append("asked")
        return True


def test_a_backend_prepares_once_before_it_is_asked(spoil: pytest.MonkeyPatch) -> None:
    toy = Preparing(priority=50)
    qc.register(toy)
    qw = qc.quantize(np.ones((4, 64), np.float32))
    for _ in range(3):
        qc.dot(np.ones((2, 64), np.float32), qw)
    assert toy.noted[:2] == ["prepared", "asked"]
    assert toy.noted.count("prepared") == 1


def test_a_backend_that_cannot_prepare_is_unavailable(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Preparing(OSError("no device"), priority=50))
    qw = qc.quantize(np.ones((4, 64), np.float32))
    assert qc.dot(np.ones((2, 64), np.float32), qw).shape == (2, 4)
    (record,) = [r for r in qc.backends() if r.name == "toy"]
    assert (record.state, record.reason) == (State.UNAVAILABLE, "its prepare() failed: OSError: no device")


class OwnArray:
    """An array type of nobody's but the toy's."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype


def test_the_first_tensor_over_its_arrays_prepares_a_backend(spoil: pytest.MonkeyPatch) -> None:
    toy = Preparing(library="own", array_types=("own_arrays:OwnArray",))
    spoil.setitem(sys.modules, "own_arrays", SimpleNamespace(OwnArray=OwnArray))
    qc.register(toy)
    packed, scales = OwnArray(np.zeros((4, 8), np.uint32)), OwnArray(np.zeros((4, 1), np.float32))
    assert toy.noted == []
    qc.QuantizedTensor(packed, scales, scales, qc.Scheme(), 64)
    assert toy.noted == ["prepared"]


# --- what is imported when ------------------------------------------------------------------------------------

FRAMEWORKS = ("mlx", "torch", "jax", "numba", "array_api_strict", "dask", "cupy", "ndonnx", "sparse")

IMPORTS = """
import sys
import quantcore
roots = {name.partition(".")[0] for name in sys.modules}
print(sorted(roots & set(%r)))
print(sorted(name for name in sys.modules if name.startswith("quantcore_backends")))
print("importlib.metadata" in sys.modules, quantcore.registry._phase)
"""


def run(code: str, *options: str) -> list[str]:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_quantcore_loads_no_framework_and_no_entry_point() -> None:
    frameworks, backends, phase = run(IMPORTS % (FRAMEWORKS,))
    assert frameworks == "[]"
    assert backends == "[]"
    assert phase.endswith("new")


def test_a_numpy_dot_imports_no_other_framework() -> None:
    lines = run(f"""
import sys, numpy as np, quantcore as qc
qw = qc.quantize(np.ones((4, 64), np.float32))
qc.dot(np.ones((2, 64), np.float32), qw); qc.take(qw, [0]); qw.dequantize(); qc.array_namespace(qw).matmul(qw, qw.mT)
qc.backends(); print(qc.explain("dot", np.ones((2, 64), np.float32), qw))
roots = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(roots & set({tuple(f for f in FRAMEWORKS if f != "numba")!r})))
""")
    assert lines[-1] == "[]"  # numba compiles NumPy's own kernels and is no other array library


def test_plugin_modules_import_no_framework() -> None:
    lines = run(f"""
import sys
import quantcore_backends.mlx_backend, quantcore_backends.array_api_backend, quantcore_backends.numpy_backend
import quantcore_backends.jax_backend, quantcore_backends.torch_backend
roots = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(roots & set({FRAMEWORKS!r})))
""")
    assert lines == ["[]"]


def test_a_missing_mlx_is_silent_and_listed_with_its_hint() -> None:
    lines = run(
        """
import sys
sys.modules["mlx"] = None
import numpy as np, quantcore as qc
qw = qc.quantize(np.ones((4, 64), np.float32))
print(qc.dot(np.ones((2, 64), np.float32), qw).shape)
(record,) = [r for r in qc.backends() if r.name == "mlx"]
print(record.state, record.reason, record.install_hint)
try:
    qw.to("mlx")
except qc.BackendUnavailableError as error:
    print(error)
""",
        "-W",
        "error",
    )
    assert lines[0] == "(2, 4)"
    assert lines[1].startswith("UNAVAILABLE not installed: mlx.core pip install")
    assert "pip install" in lines[2]
