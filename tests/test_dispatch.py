"""From the annotation to the kernel: priorities, overrides, fallbacks and their warning, routes, explain."""

from __future__ import annotations

import contextvars
import sys
import threading
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import quantcore as qc
from quantcore import BackendInfo, Call, dispatch, registry

Array = np.ndarray[Any, Any]

X = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
QW = qc.quantize(W, group_size=32)


class Marked:
    """A NumPy backend whose results are its `mark`, and which notes every question and every call."""

    def __init__(self, name: str, *, priority: int = 100, mark: float = 1.0, answer: Any = True, **info: Any) -> None:
        self.info = BackendInfo(
            api_version=1, name=name, library="numpy", array_types=("numpy:ndarray",), priority=priority, **info
        )
        self.mark = mark
        self.answer = answer
        self.asked: list[tuple[str, Call]] = []
        self.calls: Counter[str] = Counter()

    @qc.hookimpl
    def backend_info(self) -> BackendInfo:
        return self.info

    @qc.hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        self.asked.append((op, call))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer(op, call) if callable(self.answer) else self.answer  # type: ignore[no-any-return]

    @qc.hookimpl
    def quantize(self, w: Array, scheme: qc.Scheme) -> tuple[Array, Array, Array]:
        self.calls["quantize"] += 1
        return (
            np.zeros(scheme.packed_shape(w.shape), np.uint32),
            np.full(scheme.scales_shape(w.shape), self.mark, w.dtype),
            np.full(scheme.scales_shape(w.shape), self.mark, w.dtype),
        )

    @qc.hookimpl
    def dequantize(self, qw: qc.QuantizedTensor, dtype: str) -> Array:
        self.calls["dequantize"] += 1
        return np.full(qw.shape, self.mark, np.float32)

    @qc.hookimpl
    def dot(self, x: Array, qw: qc.QuantizedTensor, dtype: str, precision: str) -> Array:
        self.calls["dot"] += 1
        return np.full((*x.shape[:-1], qw.shape[-2]), self.mark, np.float32)


def mark_of(**options: Any) -> float | str:
    """Which marked backend computed a dot, by its mark; ``"numpy"`` where NumPy's own did."""
    values = np.unique(qc.dot(X, QW, **options))
    return float(values[0]) if len(values) == 1 else "numpy"


# --- choice ---------------------------------------------------------------------------------------------------


def test_the_highest_priority_computes(spoil: pytest.MonkeyPatch) -> None:
    assert mark_of() == "numpy"
    qc.register(Marked("low", priority=-5, mark=1))
    assert mark_of() == "numpy"
    qc.register(Marked("high", priority=10, mark=2))
    assert mark_of() == 2
    qc.register(Marked("higher", priority=20, mark=3))
    assert mark_of() == 3
    qc.unregister("higher")
    assert mark_of() == 2
    qc.unregister("high")
    assert mark_of() == "numpy"


def test_equal_priorities_go_by_name(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Marked("zebra", mark=1))
    qc.register(Marked("aardvark", mark=2))
    assert mark_of() == 2
    assert [v.backend for v in qc.explain("dot", X, QW).verdicts][:2] == ["aardvark", "zebra"]


def test_argument_before_context_before_annotation(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Marked("one", priority=-1, mark=1))
    qc.register(Marked("two", priority=-2, mark=2))
    assert mark_of() == "numpy"
    with qc.use_backend("one"):
        assert mark_of() == 1
        assert mark_of(backend="two") == 2
        assert mark_of(backend="numpy") == "numpy"
        with qc.use_backend("two"):
            assert mark_of() == 2
            with qc.use_backend("numpy"):
                assert mark_of() == "numpy"
            assert mark_of() == 2
        assert mark_of() == 1
    assert mark_of() == "numpy"


def test_use_backend_is_for_every_op(spoil: pytest.MonkeyPatch) -> None:
    one = Marked("one", priority=-1, mark=7)
    qc.register(one)
    with qc.use_backend("one"):
        made = qc.quantize(W, group_size=32)
        dense = QW.dequantize()
        qc.matmul(X, QW.mT)
        qc.tensordot(X, QW, axes=([1], [1]))
        _ = X @ QW.mT
        qc.dot(QW, X)
    assert (made.scales == 7).all()
    assert (dense == 7).all()
    assert one.calls == {"quantize": 1, "dequantize": 1, "dot": 4}


def test_use_backend_is_undone_by_an_exception(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Marked("one", priority=-1))
    with pytest.raises(RuntimeError), qc.use_backend("one"):
        raise RuntimeError
    assert mark_of() == "numpy"


def test_use_backend_is_per_thread_and_per_context(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Marked("one", priority=-1, mark=1))
    qc.register(Marked("two", priority=-2, mark=2))
    found: dict[str, float | str] = {}
    inside = threading.Barrier(2)

    def work(name: str) -> None:
        found[f"{name} before"] = mark_of()
        with qc.use_backend(name):
            inside.wait(10)  # both threads are inside at one time
            found[name] = mark_of()
            inside.wait(10)

    with qc.use_backend("one"):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        copied = contextvars.copy_context()
    assert found == {"one before": "numpy", "two before": "numpy", "one": 1, "two": 2}
    assert copied.run(mark_of) == 1
    assert mark_of() == "numpy"


def test_use_backend_and_use_precision_do_not_undo_each_other(spoil: pytest.MonkeyPatch) -> None:
    one = Marked("one", priority=-1)
    qc.register(one)
    with qc.use_backend("one"), qc.use_precision("fast"):
        assert mark_of() == 1
    assert one.asked[-1][1].precision == "fast"


def test_an_override_of_another_library_never_moves_data(spoil: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(qc.NoBackendError, match=r"dot of x \(3, 64\).*'mlx'.*numpy.*\.to\('mlx'\)"),
        qc.use_backend("mlx"),
    ):
        qc.dot(X, QW)
    moved = QW.to("mlx")
    with qc.use_backend("mlx"):
        assert isinstance(qc.dot(mx.array(X), moved), mx.array)


def test_the_backend_for_any_library_takes_whatever_array(lib: Any) -> None:
    x, qw = lib.array(X), QW.to(lib.name)
    result = qc.dot(x, qw, backend="array_api")
    np.testing.assert_allclose(lib.numpy(result), X @ QW.dequantize().T, rtol=1e-5, atol=1e-4)
    assert qc.explain("dot", x, qw, backend="array_api").backend == "array_api"


def test_types_match_by_isinstance_once_their_module_is_loaded(spoil: pytest.MonkeyPatch) -> None:
    class Tagged(np.ndarray[Any, Any]):
        pass

    spoil.setitem(sys.modules, "tagged_arrays", type(sys)("tagged_arrays"))
    sys.modules["tagged_arrays"].Tagged = Tagged  # type: ignore[attr-defined]
    for_tagged = Marked("tagged", mark=3)
    for_tagged.info = replace(for_tagged.info, array_types=("tagged_arrays:Tagged", "never_loaded:Other"))
    qc.register(for_tagged)
    leaves, rebuild = QW.flatten()
    tagged = rebuild([leaf.view(Tagged) for leaf in leaves])
    assert mark_of() == "numpy"
    assert (qc.dot(X.view(Tagged), tagged) == 3).all()


def test_a_class_inside_a_class_can_be_named(spoil: pytest.MonkeyPatch) -> None:
    class Outer:
        class Inner(np.ndarray[Any, Any]):
            pass

    spoil.setitem(sys.modules, "nested_arrays", type(sys)("nested_arrays"))
    sys.modules["nested_arrays"].Outer = Outer  # type: ignore[attr-defined]
    nested = Marked("nested", mark=4)
    nested.info = replace(nested.info, array_types=("nested_arrays:Outer.Inner",))
    qc.register(nested)
    assert (qc.dot(X.view(Outer.Inner), QW) == 4).all()


# --- what supports() is told, and what it may answer ----------------------------------------------------------


def test_supports_is_told_everything_static(spoil: pytest.MonkeyPatch) -> None:
    one = Marked("one")
    qc.register(one)
    qc.dot(X.astype(np.float16), QW.mT.mT.astype("float16"), precision="fast")
    op, call = one.asked[-1]
    assert op == "dot"
    assert call.scheme is QW.scheme
    assert (call.layout, call.transposed, call.dtype, call.x_dtype) == ("row", False, "float16", "float16")
    assert (call.device, call.precision) == ("cpu", "fast")
    qc.matmul(X, qc.quantize(W.T.copy(), "affine-int4-row", backend="numpy"))
    assert one.asked[-1][1].transposed is True
    qc.quantize(W, "affine-int8-row")
    op, call = one.asked[-1]
    assert (op, str(call.scheme), call.x_dtype) == ("quantize", "affine-int8-row", None)
    QW.mT.dequantize()
    op, call = one.asked[-1]
    assert (op, call.transposed) == ("dequantize", False)  # kernels are never given a transposed weight to dequantize


@pytest.mark.parametrize("shape_dependent", [False, True])
def test_shapes_are_for_backends_that_declare_them(spoil: pytest.MonkeyPatch, shape_dependent: bool) -> None:
    one = Marked("one", shape_dependent=shape_dependent)
    qc.register(one)
    qc.dot(X, QW)
    call = one.asked[-1][1]
    assert (call.x_shape, call.w_shape) == (((3, 64), (5, 64)) if shape_dependent else (None, None))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("only on Tuesdays", "one: only on Tuesdays"),
        (False, "one: refuses, giving no reason"),
        (None, "one: refuses, giving no reason"),
        ("", "one: refuses, giving no reason"),
        (1, "one: refuses, giving no reason"),
        (ZeroDivisionError("oops"), "one: its supports() raised ZeroDivisionError: oops"),
    ],
    ids=str,
)
def test_refusals_are_shown_and_the_next_one_computes(spoil: pytest.MonkeyPatch, answer: Any, words: str) -> None:
    qc.register(Marked("one", answer=answer))
    assert mark_of() == "numpy"
    explanation = qc.explain("dot", X, QW)
    assert explanation.backend == "numpy"
    assert words in str(explanation)
    with pytest.raises(
        qc.UnsupportedError, match=r"dot of x \(3, 64\) float32, weight \(5, 64\) affine-int4-g32"
    ) as caught:
        qc.dot(X, QW, backend="one")
    assert words in str(caught.value)


def test_where_every_backend_refuses_each_reason_is_told(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Marked("one", answer="too big"))
    qc.register(Marked("two", answer="too small"))
    qc.unregister("numpy")
    qc.unregister("array_api")
    with pytest.raises(qc.UnsupportedError) as caught:
        qc.dot(X, QW)
    for word in ("one: too big", "two: too small", "dot", "(3, 64)", "(5, 64)", "affine-int4-g32", "dequantize"):
        assert word in str(caught.value)
    explanation = qc.explain("dot", X, QW)
    assert explanation.backend is None
    assert [v.reason for v in explanation.verdicts] == ["too big", "too small"]


def test_a_missing_optional_hook_is_a_refusal(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Marked("one"))
    np.testing.assert_array_equal(qc.take(QW, [1]), qc.take(QW, [1], backend="numpy"))
    assert "one: has no take" in str(qc.explain("take", QW))
    with pytest.raises(qc.UnsupportedError, match=r"take of weight \(5, 64\).*one: has no take"):
        qc.take(QW, [1], backend="one")


# --- the table of routes --------------------------------------------------------------------------------------


def test_supports_is_asked_once_per_kind_of_call(spoil: pytest.MonkeyPatch) -> None:
    one = Marked("one")
    qc.register(one)
    for _ in range(5):
        for rows in (1, 2, 3):
            qc.dot(X[:rows], QW)
    assert len(one.asked) == 1
    qc.dot(X, qc.quantize(W[:2], group_size=32, backend="numpy"))  # another weight of the same kind
    assert len(one.asked) == 1
    assert one.calls["dot"] == 16


@pytest.mark.parametrize(
    "other",
    [
        lambda: qc.dot(X.astype(np.float16), QW),
        lambda: qc.dot(X, QW, precision="highest"),
        lambda: qc.dot(X[:, :5], QW.mT),
        lambda: qc.dot(X, QW.astype("float16")),
        lambda: qc.dot(X, qc.quantize(W, bits=8, group_size=32, backend="numpy")),
        lambda: QW.dequantize(),
        lambda: qc.quantize(W, group_size=32),
        lambda: qc.dot(X, QW, backend="one"),
    ],
    ids=["x dtype", "precision", "orientation", "dtype", "scheme", "dequantize", "quantize", "override"],
)
def test_another_kind_of_call_is_another_question(spoil: pytest.MonkeyPatch, other: Any) -> None:
    one = Marked("one")
    qc.register(one)
    qc.dot(X, QW)
    assert len(one.asked) == 1
    other()
    assert len(one.asked) == 2
    other()
    assert len(one.asked) == 2


def test_registration_asks_again(spoil: pytest.MonkeyPatch) -> None:
    one = Marked("one")
    qc.register(one)
    qc.dot(X, QW)
    before = registry.current
    qc.register(Marked("two", priority=1))
    assert registry.current is not before
    qc.dot(X, QW)
    assert len(one.asked) == 2
    qc.unregister("two")
    qc.dot(X, QW)
    assert len(one.asked) == 3
    qc.refresh()
    qc.dot(X, QW)
    qc.dot(X, QW)
    assert len(one.asked) == 4


def test_a_backend_that_looks_at_shapes_is_asked_once_per_shape(spoil: pytest.MonkeyPatch) -> None:
    def only_even(op: str, call: Call) -> bool | str:
        assert call.x_shape is not None
        return True if call.x_shape[0] % 2 == 0 else f"odd number of rows: {call.x_shape[0]}"

    one = Marked("one", answer=only_even, shape_dependent=True)
    qc.register(one)
    for _ in range(3):
        assert (qc.dot(X[:2], QW) == 1).all()
        np.testing.assert_array_equal(qc.dot(X[:1], QW), qc.dot(X[:1], QW, backend="numpy"))
    assert len(one.asked) == 2
    assert "odd number of rows: 3" in str(qc.explain("dot", X, QW))


def test_weights_of_equal_packed_shape_and_other_length_have_their_own_route(spoil: pytest.MonkeyPatch) -> None:
    one = Marked("one", answer=lambda op, call: True if call.w_shape[-1] == 64 else "not 64", shape_dependent=True)
    qc.register(one)
    shorter = qc.quantize(W[:, :63].copy(), group_size=32, pad=True, backend="numpy")
    assert shorter.packed.shape == QW.packed.shape
    assert mark_of() == 1
    assert len(np.unique(qc.dot(X[:, :63], shorter))) > 1
    assert (QW.dequantize() == 1).all()
    assert len(np.unique(shorter.dequantize())) > 1


def test_the_table_of_shapes_is_bounded(spoil: pytest.MonkeyPatch) -> None:
    spoil.setattr(dispatch, "_MAX_SHAPES", 4)
    one = Marked("one", shape_dependent=True)
    qc.register(one)
    for rows in range(20):
        qc.dot(np.ones((rows, 64), np.float32), QW)
    assert all(len(table) <= 4 for table in registry.current.routes.values() if isinstance(table, dict))
    assert one.calls["dot"] == 20


# --- the fallback and its warning -----------------------------------------------------------------------------


def warnings_of(call: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, qc.PerformanceWarning)]


def test_a_fallback_to_the_array_api_warns_exactly_once(spoil: pytest.MonkeyPatch, close: Any) -> None:
    spoil.setattr(dispatch, "_warned", set())
    one = Marked("one", answer="not today")
    qc.register(one)
    results_of_numpy = qc.dot(X, QW)
    qc.unregister("numpy")
    results: list[Array] = []
    (told,) = warnings_of(lambda: results.extend(qc.dot(X[:rows], QW) for rows in (1, 2, 3, 3)))
    for word in ("dot", "affine-int4-g32", "array_api", "one: not today"):
        assert word in str(told.message)
    assert told.filename == __file__  # the caller's own line
    close(results[-1], results_of_numpy)
    explanation = qc.explain("dot", X, QW)
    assert explanation.backend == "array_api"
    assert "one: not today" in str(explanation)
    assert "→ array_api" in str(explanation)
    qc.refresh()  # a new table, but the user knows
    qc.unregister("numpy")
    assert warnings_of(lambda: qc.dot(X, QW)) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: qc.quantize(mx.array(W), group_size=16),
        lambda: qc.matmul(mx.array(X), qc.quantize(W, group_size=16).to("mlx").mT),
        lambda: qc.dot(mx.array(X), qc.quantize(W, group_size=16).to("mlx"), axes=([1], [1])),
        lambda: qc.quantize(W, group_size=16).to("mlx").dequantize(),
        lambda: qc.take(qc.quantize(W, group_size=16).to("mlx"), [0]),
        lambda: qc.gather_dot(mx.array(X), qc.quantize(W, group_size=16).to("mlx")),
    ],
    ids=["quantize", "matmul", "tensordot", "dequantize", "take", "gather_dot"],
)
def test_what_mlx_refuses_falls_back_and_names_the_caller_s_line(spoil: pytest.MonkeyPatch, call: Any) -> None:
    spoil.setattr(dispatch, "_warned", set())
    qc.refresh()
    (told,) = warnings_of(call)
    assert "mlx: MLX's kernels take groups of 32, 64, 128, not 16" in str(told.message)
    assert told.filename == __file__


def test_no_warning_where_nobody_refused_or_where_it_was_asked_for(spoil: pytest.MonkeyPatch) -> None:
    spoil.setattr(dispatch, "_warned", set())
    qc.refresh()
    strict = QW.to("array_api_strict")
    qw = qc.quantize(W, group_size=16).to("mlx")
    assert warnings_of(lambda: strict.dequantize()) == []
    assert warnings_of(lambda: qc.dot(mx.array(X), qw, backend="array_api")) == []


# --- explain --------------------------------------------------------------------------------------------------


def test_explain_reads_like_this() -> None:
    text = str(qc.explain("dot", X, QW))
    lines = text.splitlines()
    assert lines[0] == "dot of x (3, 64) float32, weight (5, 64) affine-int4-g32 float32 in numpy, precision 'default'"
    assert lines[1] == " → numpy: computes it"
    assert "array_api: would compute it as well" in lines[2]


def test_explain_computes_nothing(spoil: pytest.MonkeyPatch) -> None:
    one = Marked("one")
    qc.register(one)
    for arguments in [("dot", X, QW), ("matmul", X, QW.mT), ("dequantize", QW), ("quantize", W)]:
        assert qc.explain(*arguments).backend == "one"
    assert not one.calls


@pytest.mark.parametrize(
    ("arguments", "kernel", "transposed"),
    [
        (("dot", X, QW), "dot", False),
        (("dot", QW, X), "dot", False),
        (("dot", X[:, :5], QW.mT), "dot", True),
        (("matmul", X, QW.mT), "dot", False),
        (("matmul", X[:, :5], QW), "dot", True),
        (("matmul", QW, X.T), "dot", False),
        (("matmul", QW.mT, X[:, :5].T), "dot", True),
        (("matmul", QW, X[0]), "dot", False),
        (("dequantize", QW.mT), "dequantize", False),
        (("quantize", W), "quantize", False),
    ],
)
def test_explain_asks_what_the_call_asks(
    spoil: pytest.MonkeyPatch, arguments: tuple[Any, ...], kernel: str, transposed: bool
) -> None:
    one = Marked("one", shape_dependent=True)
    qc.register(one)
    qc.explain(*arguments, **({"scheme": "affine-int4-g64"} if kernel == "quantize" else {}))
    op, *operands = arguments
    getattr(qc, op)(*operands)
    explained, called = one.asked
    assert explained == called
    assert (called[0], called[1].transposed) == (kernel, transposed)


def test_explain_take_and_gather_dot_and_prepack() -> None:
    assert qc.explain("take", QW).backend == "numpy"
    assert qc.explain("gather_dot", X, QW).backend == "numpy"
    assert "prepack" in qc.explain("prepack", QW).request
    moved = qc.quantize(W, group_size=16).to("mlx")
    assert qc.explain("take", moved, [0]).backend == "array_api"


def test_explain_takes_the_options_of_the_call() -> None:
    assert qc.explain("dot", X, QW, backend="array_api").backend == "array_api"
    assert "precision 'fast'" in str(qc.explain("dot", X, QW, precision="fast"))
    assert "affine-int2-row" in str(qc.explain("quantize", W, scheme="affine-int2-row"))
    with qc.use_backend("array_api"), qc.use_precision("highest"):
        explanation = qc.explain("dot", X, QW)
    assert explanation.backend == "array_api"
    assert "'highest'" in explanation.request


def test_explain_of_a_call_that_raises_says_why() -> None:
    explanation = qc.explain("dot", X, QW, backend="nonesuch")
    assert explanation.backend is None
    assert "'nonesuch'" in explanation.note
    assert str(explanation).count("dot of x") == 1
    assert "'nonesuch'" in str(explanation)


class Describing(Marked):
    """A backend that says how it computes."""

    def __init__(self, name: str, words: Any, **options: Any) -> None:
        super().__init__(name, **options)
        self.words = words

    @qc.hookimpl
    def describe(self, op: str, call: Call) -> str:
        return self.words(op, call)  # type: ignore[no-any-return]


def test_explain_shows_the_path_of_the_chosen_backend_alone(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Describing("one", lambda op, call: f"{op} of {call.x_shape} by {call.w_shape}"))
    qc.register(Describing("two", lambda op, call: "never asked", priority=50))
    explanation = qc.explain("dot", X, QW)
    assert [v.path for v in explanation.verdicts][:2] == ["dot of (3, 64) by (5, 64)", ""]
    assert str(explanation).splitlines()[1] == " → one: computes it: dot of (3, 64) by (5, 64)"
    assert "never asked" in str(qc.explain("dot", X, QW, backend="two"))


def test_explain_survives_a_describe_that_fails(spoil: pytest.MonkeyPatch) -> None:
    qc.register(Describing("one", lambda op, call: call.nonesuch))
    explanation = qc.explain("dot", X, QW)
    assert explanation.backend == "one"
    assert "describe() raised AttributeError" in str(explanation)


def test_explain_is_true(lib: Any) -> None:
    for group in (16, 32):
        x, qw = lib.array(X), qc.quantize(W, group_size=group).to(lib.name)
        expected = {"numpy": "numpy", "array_api_strict": "array_api"}.get(
            lib.name, "mlx" if group == 32 else "array_api"
        )
        assert qc.explain("dot", x, qw).backend == expected


# --- nothing that was computed before changes -----------------------------------------------------------------


def test_an_unrelated_plugin_changes_no_result(spoil: pytest.MonkeyPatch) -> None:
    before = qc.dot(X, QW)
    other = Marked("other")
    other.info = replace(other.info, library="elsewhere", array_types=("elsewhere:Array",))
    qc.register(other)
    assert qc.dot(X, QW).tobytes() == before.tobytes()
    assert other.asked == []


def test_the_path_of_x_is_ops_dispatch_backend() -> None:
    qc.dot(X, QW)
    entered: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            entered.append(frame.f_globals.get("__name__", "?"))

    sys.setprofile(note)
    try:
        qc.dot(X, QW)
    finally:
        sys.setprofile(None)
    path = list(dict.fromkeys(entered))
    assert path[:3] == ["quantcore.ops", "quantcore.dispatch", "quantcore_backends.numpy_backend"]
