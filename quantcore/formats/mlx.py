"""MLX checkpoints: folders of safetensors whose config says how each module is quantized.

As mlx-lm reads them (mlx_lm/utils.py, `load_model`): a module X is quantized where ``X.scales`` exists;
``quantization`` in the config gives mode, bits and group size for all, or under a module's path for that one alone.
Such an override replaces the global values as a whole: what it leaves out takes the mode's default.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from quantcore.errors import UnsupportedError
from quantcore.formats.affine import FLOATS, check_finite, scheme_of
from quantcore.formats.checkpoint import Entry
from quantcore.formats.config import Settings
from quantcore.formats.files import Stored, malformed
from quantcore.formats.microscaled import is_nan
from quantcore.scheme import DEFAULTS, Scheme
from quantcore.tensor import QuantizedTensor

__all__ = ["entries", "override_names"]

_PARAMETERS: Final = ("group_size", "bits", "mode")

Renamer = Callable[[str], str]


def entries(
    tensors: Mapping[str, Stored], settings: Settings, rename: Renamer, *, whole: bool
) -> tuple[dict[str, Entry], set[str]]:
    """The quantized weights, and the names of the tensors that went into them.

    Parameters
    ----------
    tensors : mapping of str to Stored
    settings : Settings
        The config's ``quantization``.
    rename : callable
        Overrides may go by a module's name in the file or by the one that it is given.
    whole : bool
        Whether an override for a module that isn't there is an error.
    """
    modules = [name.removesuffix(".scales") for name in tensors if _is_quantized(tensors, name)]
    overrides = {name: value for name, value in settings.values.items() if _is_override(value)}
    known = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    _check_overrides(settings, overrides, known | {_module(rename, name) for name in known}, whole)
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for module in modules:
        parts = [f"{module}.weight", f"{module}.scales", f"{module}.biases"]
        used.update(name for name in parts if name in tensors)
        found[f"{module}.weight"] = _entry(tensors, module, _settings_of(module, settings, overrides, rename))
    for module in known - set(modules):
        if isinstance(_override(module, settings, overrides, rename), dict):
            tensors[f"{module}.weight"].malformed(f"the config says how it is quantized, but has no {module}.scales")
    return found, used


def override_names(values: Mapping[str, Any], rename: Renamer) -> dict[str, Any]:
    """The config's ``quantization`` with its overrides under the modules' new names."""
    return {_module(rename, name) if _is_override(value) else name: value for name, value in values.items()}


def _is_quantized(tensors: Mapping[str, Stored], name: str) -> bool:
    module, dot, suffix = name.rpartition(".")
    weight = tensors.get(f"{module}.weight")
    return bool(dot) and suffix == "scales" and weight is not None and weight.dtype_name == "uint32"


def _is_override(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _module(rename: Renamer, module: str) -> str:
    """The new name of a module: that of its weight, without the end."""
    new = rename(f"{module}.weight")
    return new.removesuffix(".weight") if isinstance(new, str) else module


def _check_overrides(settings: Settings, overrides: Mapping[str, Any], known: set[str], whole: bool) -> None:
    base = {name: settings.values.get(name) for name in _PARAMETERS}
    for name, value in overrides.items():
        if whole and name not in known and isinstance(value, dict) and {n: value.get(n) for n in _PARAMETERS} != base:
            settings.malformed(
                f"the override for {name[:200]!r} fits no module here; if modules go by other names there, pass rename"
            )


def _override(module: str, settings: Settings, overrides: Mapping[str, Any], rename: Renamer) -> Any:
    own, new = overrides.get(module), overrides.get(_module(rename, module))
    if own is not None and new is not None and own != new:
        settings.malformed(f"the overrides for {module!r} and {_module(rename, module)!r}, the same module, differ")
    return own if own is not None else new


def _settings_of(module: str, settings: Settings, overrides: Mapping[str, Any], rename: Renamer) -> Settings:
    override = _override(module, settings, overrides, rename)
    if override is False:
        settings.malformed(f"{module!r} is said not to be quantized, but has scales")
    if isinstance(override, dict):
        return Settings(override, settings.file, f"{settings.place}[{module!r}]")
    return settings


def _entry(tensors: Mapping[str, Stored], module: str, settings: Settings) -> Entry:
    packed, scales = tensors[f"{module}.weight"], tensors[f"{module}.scales"]
    biases = tensors.get(f"{module}.biases")
    mode = settings.text("mode", default="affine")
    if mode not in DEFAULTS:
        settings.malformed(f"unknown mode {mode[:40]!r}; there are {', '.join(DEFAULTS)}")
    default_bits, default_group = DEFAULTS[mode]
    bits = settings.integer("bits", default=default_bits)
    group = settings.integer("group_size", default=default_group)
    if not 1 <= bits <= 8 or group < 1:
        settings.malformed(f"{bits} bits in groups of {group}")
    if len(packed.shape) < 2 or packed.shape[:-1] != scales.shape[:-1]:
        scales.malformed(f"shape {scales.shape}, {packed.name} has {packed.shape}")
    in_features, rest = divmod(packed.shape[-1] * 32, bits)
    if rest or in_features == 0 or scales.shape[-1] * group != in_features:
        scales.malformed(
            f"shape {scales.shape} beside codes of shape {packed.shape} isn't that of {bits} bits in groups of {group}"
        )
    shape = (*packed.shape[:-1], in_features)
    nbytes = packed.nbytes + scales.nbytes + (biases.nbytes if biases else 0)
    if mode != "affine":
        if (bits, group) != DEFAULTS[mode]:
            settings.malformed(f"{mode} has {default_bits} bits in groups of {default_group}")
        if biases is not None:
            biases.malformed(f"{mode} has no biases")
        return Entry(shape, "bfloat16", mode, nbytes, Scheme(mode), _microscaled(tensors, module, mode, in_features))
    if biases is None:
        scales.malformed(f"there is no {module}.biases beside it")
    for part in (scales, biases):
        if part.dtype_name not in FLOATS or part.shape != scales.shape:
            part.malformed(f"{part.dtype_name} of shape {part.shape}; expected floats of shape {scales.shape}")
    scheme = scheme_of(packed, bits, group, -1)

    def read() -> QuantizedTensor:
        leaves = packed.array(), scales.array(), biases.array()
        check_finite(scales, leaves[1])
        check_finite(biases, leaves[2])
        return QuantizedTensor(*leaves, scheme, in_features)

    dtype = scales.dtype_name if scales.dtype == biases.dtype else "float32"
    return Entry(shape, dtype, "MLX", nbytes, scheme, read)


def _microscaled(
    tensors: Mapping[str, Stored], module: str, mode: str, in_features: int
) -> Callable[[], QuantizedTensor]:
    packed, scales = tensors[f"{module}.weight"], tensors[f"{module}.scales"]
    if scales.dtype_name != "uint8":
        scales.malformed(f"dtype {scales.dtype_name}; expected uint8 in {mode}")

    def read() -> QuantizedTensor:
        if f"{module}.global_scale" in tensors:
            raise UnsupportedError(f"{packed.place}: {mode} with a {module}.global_scale beside it isn't read")
        codes = scales.array()
        bad = is_nan(codes, mode)
        if bad.any():
            at = scales.offset + int(bad.reshape(-1).argmax())
            malformed(scales.file.path, "a scale is NaN", tensor=scales.name, offset=at)
        # What mx.dequantize gives unless asked.
        return QuantizedTensor(packed.array(), codes, None, Scheme(mode), in_features, dtype="bfloat16")

    return read
