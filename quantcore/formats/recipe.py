"""What to do with each tensor of a checkpoint that is converted: keep it, quantize it, or make it dense."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from quantcore.dtypes import REAL_FLOATING
from quantcore.encode import quantize
from quantcore.formats.checkpoint import Checkpoint, Entry
from quantcore.scheme import Scheme
from quantcore.tensor import QuantizedTensor

__all__ = ["Converted", "Recipe", "is_matrix"]

_KEEP: Final = "keep"
_DENSE: Final = "dense"


def is_matrix(name: str, entry: Entry) -> bool:
    """Whether a tensor is a dense one that is worth quantizing: a floating ``X.weight`` of two axes or more."""
    floating = entry.scheme is None and entry.dtype in REAL_FLOATING
    return floating and len(entry.shape) > 1 and (name == "weight" or name.endswith(".weight"))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which scheme each tensor gets.

    Parameters
    ----------
    default : Scheme or None
        For all matrices, quantized ones anew; None keeps all as they are.
    rules : sequence of (str, Scheme or str)
        Patterns of names, and a scheme, ``"keep"`` or ``"dense"`` for those that match. The first that matches decides.
    """

    default: Scheme | None = None
    rules: Sequence[tuple[str, Scheme | str]] = ()

    @classmethod
    def parse(cls, bits: int | None, group_size: int | None, rules: Sequence[str]) -> "Recipe":
        """Read a recipe from options and from rules like ``*.lm_head.weight=affine-int8-g64``.

        Raises
        ------
        ValueError
            Naming the rule that can't be read.
        """
        default = None
        if bits is None and group_size is not None:
            raise ValueError("group_size (--group-size) goes with bits (--bits): give both, or neither")
        if bits is not None:
            default = Scheme("affine", bits, 64 if group_size is None else group_size)
        return cls(default, [_rule(text) for text in rules])

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns of rules that match no name: misspelt, perhaps."""
        found = list(names)
        return [pattern for pattern, _ in self.rules if not any(fnmatchcase(name, pattern) for name in found)]

    def action(self, name: str, entry: Entry) -> Scheme | str:
        """The scheme that a tensor gets, ``"keep"`` or ``"dense"``."""
        for pattern, action in self.rules:
            if fnmatchcase(name, pattern):
                return action
        if self.default is None or not (entry.scheme is not None or is_matrix(name, entry)):
            return _KEEP
        # A row that isn't whole groups stays: MLX can't hold it, and a rule can name another scheme for it.
        return self.default if self.default.divides(entry.shape[-1]) else _KEEP


def _rule(text: str) -> tuple[str, Scheme | str]:
    pattern, equals, action = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"can't read the rule {text!r}; write it like '*.lm_head.weight=affine-int8-g64'")
    return pattern, action if action in (_KEEP, _DENSE) else Scheme.parse(action)


class Converted(Mapping[str, Any]):
    """A checkpoint's tensors as a recipe wants them, each read and converted when it is looked up.

    Attributes
    ----------
    requantized : list of str
        The names of those that were quantized already and were quantized anew, which loses something.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._checkpoint = checkpoint
        self._actions = {name: recipe.action(name, entry) for name, entry in checkpoint.entries.items()}
        self.requantized: list[str] = []

    def __getitem__(self, name: str) -> Any:
        action = self._actions[name]
        tensor = self._checkpoint[name]
        if action == _KEEP:
            return tensor
        if isinstance(tensor, QuantizedTensor):
            if action is tensor.scheme:
                return tensor
            tensor = tensor.dequantize()
            if isinstance(action, Scheme):
                self.requantized.append(name)
        return _quantized(name, tensor, action) if isinstance(action, Scheme) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)


def _quantized(name: str, tensor: Any, scheme: Scheme) -> QuantizedTensor:
    try:
        return quantize(tensor, scheme)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name!r}: {error}") from None
