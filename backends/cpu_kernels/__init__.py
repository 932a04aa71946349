"""CPU kernels as plain functions on NumPy arrays, shared by the CPU backends. No plugin, no dispatch."""

from quantcore_backends.cpu_kernels.bitstream import pack, unpack
from quantcore_backends.cpu_kernels.products import dot, gather_dot
from quantcore_backends.cpu_kernels.weights import decode, encode

__all__ = ["decode", "dot", "encode", "gather_dot", "pack", "unpack"]
