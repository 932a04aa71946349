"""Checkpoints in the formats that people's quantized weights are in: read exactly, written for MLX.

Files are untrusted: every count, length and offset is checked before it is used, and what is wrong raises a
:class:`quantcore.FormatError` that names the file, the tensor and the byte. There is one module for each format.
"""

from quantcore.formats.checkpoint import Checkpoint, Entry
from quantcore.formats.reading import load
from quantcore.formats.writing import save

__all__ = ["Checkpoint", "Entry", "load", "save"]
