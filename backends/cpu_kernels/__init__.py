"""CPU kernels as plain functions on NumPy arrays, shared by the CPU backends. No plugin, no dispatch."""

from quantcore_backends.cpu_kernels.bitstream import pack, unpack
from quantcore_backends.cpu_kernels.compiled import KINDS
from quantcore_backends.cpu_kernels.integer import Geometry, Weight, serves
from quantcore_backends.cpu_kernels.likeness import independent_rows
from quantcore_backends.cpu_kernels.products import dot, gather_dot, multiply
from quantcore_backends.cpu_kernels.weights import decode, encode

__all__ = [
    "KINDS",
    "Geometry",
    "Weight",
    "decode",
    "dot",
    "encode",
    "gather_dot",
    "independent_rows",
    "multiply",
    "pack",
    "serves",
    "unpack",
]
