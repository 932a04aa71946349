"""Quantized layers in the place of a model's dense ones, by rules."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import nn

from quantcore import Scheme
from quantcore_backends.torch_backend.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

__all__ = ["LayerReport", "QuantizationReport", "quantize_module"]

Rules = Mapping[str | type[nn.Module], Scheme | str | None] | Scheme | str
Dense = nn.Linear | nn.Embedding

_REPLACED: Final = (nn.Linear, nn.Embedding)
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes
    ----------
    name : str
        Its qualified name in the model.
    kind : str
        Name of the dense layer's class.
    shape : tuple of int
        Of its weight.
    scheme : Scheme or None
        None where it stays dense.
    note : str
        Why it stays dense, or with which layer it shares its weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    note: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_module` did; ``str()`` of it is for people.

    Attributes
    ----------
    layers : tuple of LayerReport
        Every Linear and Embedding, and every other layer with a matrix for a weight that a rule fits, in the model's
        order.
    bytes_before, bytes_after : int
        Size of the model's parameters and buffers, each counted once.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        quantized = sum(layer.scheme is not None for layer in self.layers)
        lines = [
            f"{quantized} of {len(self.layers)} layers quantized, {self.bytes_before:,} → {self.bytes_after:,} bytes"
        ]
        for layer in self.layers:
            what = "dense" if layer.scheme is None else str(layer.scheme)
            lines.append(
                f"  {layer.name} ({layer.kind} {layer.shape}): {what}" + (f"; {layer.note}" if layer.note else "")
            )
        return "\n".join(lines)


def quantize_module(model: nn.Module, rules: Rules, *, pad: bool = False) -> QuantizationReport:
    """Replace a model's Linear and Embedding layers, in place, by ones with quantized weights.

    Parameters
    ----------
    model : nn.Module
        Changed in place; its other layers and its biases stay the objects that they are.
    rules : mapping of str or type to (Scheme, str or None); or a Scheme or str for all layers
        In order, the first that fits a layer decides: a pattern of qualified names (``"encoder.layer.*.query"``, as
        fnmatch has them), or a class. None leaves the layer dense, as does no rule that fits.
    pad : bool
        As for :func:`quantcore.quantize`: whether a row may end in a short group.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    TypeError, ValueError
        If a rule isn't one, fits no layer, or asks for what a layer can't be; nothing has changed then. If a weight
        isn't finite.

    Notes
    -----
    Only ``nn.Linear`` and ``nn.Embedding`` themselves are replaced: subclasses mean something else by their weight.
    Layers that share a weight share the quantized one.

    Examples
    --------
    >>> report = quantize_module(model, {"lm_head": None, nn.Embedding: "affine-int8-g64", "*": "affine-int4-g64"})
    >>> print(report)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_module: takes an nn.Module, not {type(model).__name__}")
    plan = list(_plan(model, _parsed(rules), pad))
    before = _size(model)
    layers = []
    weights: dict[int, tuple[str, QuantizedWeight]] = {}
    for name, layer, scheme, note in plan:
        if scheme is not None:
            note = _replace(model, name, layer, scheme, pad, weights)
        layers.append(LayerReport(name, type(layer).__name__, tuple(layer.weight.shape), scheme, note))
    return QuantizationReport(tuple(layers), before, _size(model))


_Plan = Iterator[tuple[str, Any, Scheme | None, str]]


def _plan(model: nn.Module, rules: Mapping[str | type, Scheme | None], pad: bool) -> _Plan:
    """Each candidate with its scheme, or with why it stays dense; raises before anything is replaced."""
    if type(model) in _REPLACED:
        raise ValueError(
            f"quantize_module: the model is a {type(model).__name__} itself and can't be replaced in place; use "
            f"Quantized{type(model).__name__}.from_{type(model).__name__.lower()}"
        )
    used: set[str | type] = set()
    shared: dict[int, tuple[str, Scheme]] = {}
    for name, layer in model.named_modules():
        rule = next((key for key in rules if _fits(key, name, layer)), None)
        is_candidate = type(layer) in _REPLACED
        weight = getattr(layer, "weight", None)
        if not (is_candidate or (rule is not None and isinstance(weight, torch.Tensor) and weight.ndim > 1)):
            continue
        if rule is not None:
            used.add(rule)
        scheme = None if rule is None else rules[rule]
        if scheme is None:
            yield name, layer, None, "no rule fits" if rule is None else f"by the rule {_shown(rule)}"
        elif not is_candidate:
            yield name, layer, None, "only nn.Linear and nn.Embedding themselves are replaced"
        elif reason := _unfit(layer):
            yield name, layer, None, reason
        else:
            _check(name, layer, scheme, pad, shared)
            yield name, layer, scheme, ""
    unused = [_shown(key) for key in rules if key not in used]
    if unused:
        raise ValueError(
            f"quantize_module: no layer is left for {', '.join(unused)}; rules are tried in order, on names such as "
            f"{', '.join(name for name, layer in model.named_modules() if type(layer) in _REPLACED)[:200]}"
        )


def _replace(
    model: nn.Module,
    name: str,
    layer: Dense,
    scheme: Scheme,
    pad: bool,
    weights: dict[int, tuple[str, QuantizedWeight]],
) -> str:
    """Put the layer's quantized counterpart wherever the layer is; what the report says of it."""
    first, weight = weights.get(id(layer.weight), ("", None))
    made: QuantizedLinear | QuantizedEmbedding
    try:
        if isinstance(layer, nn.Linear):
            of_dense = QuantizedLinear.from_linear
            made = (
                of_dense(layer, scheme, pad=pad) if weight is None else QuantizedLinear.from_tensor(weight, layer.bias)
            )
        elif weight is None:
            made = QuantizedEmbedding.from_embedding(layer, scheme, pad=pad)
        else:
            made = QuantizedEmbedding.from_tensor(weight)
    except ValueError as error:
        raise ValueError(f"quantize_module: {name}: {error}") from error
    weights[id(layer.weight)] = (first or name, made.quantized)
    made.train(layer.training)
    for parent in list(model.modules()):
        for place, child in list(parent.named_children()):
            if child is layer:
                setattr(parent, place, made)
    return f"shares its weight with {first}" if first else ""


# --- rules --------------------------------------------------------------------------------------------------------


def _parsed(rules: Rules) -> dict[str | type, Scheme | None]:
    if isinstance(rules, str | Scheme):
        rules = {"*": rules}
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"quantize_module: rules must be a scheme, or a mapping of patterns to schemes, not {type(rules).__name__}"
        )
    for key in rules:
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(f"quantize_module: a rule's key is a pattern of names or a class of modules, not {key!r}")
    return {key: None if scheme is None else Scheme.parse(scheme) for key, scheme in rules.items()}


def _fits(key: str | type, name: str, layer: nn.Module) -> bool:
    return fnmatchcase(name, key) if isinstance(key, str) else isinstance(layer, key)


def _shown(key: str | type) -> str:
    return repr(key) if isinstance(key, str) else key.__name__


def _unfit(layer: Dense) -> str:
    """Why a layer that a rule would quantize stays dense all the same; empty where it doesn't."""
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm changes the table when the layer is called"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "hooks are registered on it, which a new layer wouldn't have"
    return ""


def _check(name: str, layer: Dense, scheme: Scheme, pad: bool, shared: dict[int, tuple[str, Scheme]]) -> None:
    columns = layer.weight.shape[-1]
    if not pad and not scheme.divides(columns):
        raise ValueError(
            f"quantize_module: {name} has {columns} input features, which aren't whole groups of {scheme.group_size} "
            f"({scheme}); pass pad=True, or give it another scheme, or None"
        )
    first, other = shared.setdefault(id(layer.weight), (name, scheme))
    if other is not scheme:
        raise ValueError(
            f"quantize_module: {first} and {name} share their weight, but the rules make it {other} and {scheme}"
        )


def _size(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
