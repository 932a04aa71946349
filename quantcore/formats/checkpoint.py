"""A checkpoint: names to arrays and quantized tensors, each read when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantcore.memory import freeze
from quantcore.scheme import Scheme
from quantcore.tensor import QuantizedTensor
from quantcore.transfer import to_library

__all__ = ["Checkpoint", "Entry", "Rename", "renamed", "renamer"]

Rename = Mapping[str, str] | Callable[[str], str] | None


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a tensor before it is read.

    Parameters
    ----------
    shape : tuple of int
        Logical shape.
    dtype : str
        Name of the dtype that it has or, quantized, dequantizes to.
    kind : str
        The format's own name of how it is stored: ``"BF16"``, ``"Q4_K"``, ``"AWQ"``, ...
    nbytes : int
        Bytes that it takes in the file, scales and the like included.
    scheme : Scheme or None
        How it is quantized once read; None for a dense array.
    read : callable
        Reads it as a NumPy array or a QuantizedTensor of NumPy arrays.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    nbytes: int
    scheme: Scheme | None
    read: Callable[[], Any]


class Checkpoint(Mapping[str, Any]):
    """Names to arrays and :class:`quantcore.QuantizedTensor`, as :func:`quantcore.load` gives it.

    Looking a name up reads that tensor, each time anew: keep what you use, ``dict(checkpoint)`` reads all. Dense
    tensors and MLX's quantized ones are views of the mapped file as long as they stay in NumPy; what other formats
    pack differently is repacked. Scales and biases in NumPy are read-only, as what is mapped is.

    Attributes
    ----------
    format : str
        ``"mlx"``, ``"safetensors"``, ``"gguf"``, ``"awq"``, ``"gptq"``, ``"hqq"``, ``"compressed-tensors"`` or
        ``"onnx"``.
    path : Path
        What was loaded.
    library : str
        The array library that tensors are given in.
    config : mapping
        ``config.json``, where there is one; of a GGUF under Hugging Face's names, what it would be.
    metadata : mapping
        What the files say beside the tensors: GGUF's key-values, safetensors' ``__metadata__``.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        format: str,
        path: Path,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        library: str = "numpy",
        device: Any = None,
    ) -> None:
        self._entries = dict(entries)
        self.format = format
        self.path = path
        self.config: Mapping[str, Any] = MappingProxyType(dict(config or {}))
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata or {}))
        self.library = library
        self._device = device

    def __getitem__(self, name: str) -> Any:
        tensor = self._entries[name].read()
        if isinstance(tensor, QuantizedTensor):
            if not self._stays:
                return tensor.to(self.library, self._device)
            for leaf in tensor.flatten()[0][1:]:
                freeze(leaf)
            return tensor
        return tensor if self._stays else to_library(tensor, self.library, self._device)

    @property
    def _stays(self) -> bool:
        return self.library == "numpy" and self._device is None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Shape, dtype, scheme and size of every tensor; reading none."""
        return MappingProxyType(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take in the files."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __repr__(self) -> str:
        quantized = sum(entry.scheme is not None for entry in self._entries.values())
        return (
            f"Checkpoint({self.format}, {len(self)} tensors, {quantized} of them quantized, {self.nbytes:,} bytes, "
            f"{self.library}, {str(self.path)!r})"
        )


def renamer(rename: Rename) -> Callable[[str], str]:
    """The function that a `rename` argument stands for; a mapping leaves other names as they are."""
    if rename is None:
        return lambda name: name
    if isinstance(rename, Mapping):
        table = dict(rename)
        return lambda name: table.get(name, name)
    if callable(rename):
        return rename
    raise TypeError(f"load: rename must be a mapping or a function of names, not {type(rename).__name__}")


def renamed(entries: Mapping[str, Entry], rename: Callable[[str], str]) -> dict[str, Entry]:
    """The entries under their new names, which must differ from each other."""
    found: dict[str, Entry] = {}
    origin: dict[str, str] = {}
    for name, entry in entries.items():
        new = rename(name)
        if not isinstance(new, str):
            raise TypeError(f"load: rename gives {type(new).__name__} for {name!r}, not a string")
        if new in found:
            raise ValueError(f"load: rename gives {new!r} for both {origin[new]!r} and {name!r}")
        found[new], origin[new] = entry, name
    return found


def dense(stored: Any) -> Entry:
    """The entry of a tensor that is stored as it is."""
    return Entry(stored.shape, stored.dtype_name, stored.kind, stored.nbytes, None, stored.array)
