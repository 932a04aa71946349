"""The CPU kernels as XLA typed-FFI targets, compiled by Numba: no Python callback, no compiler, no copy of a weight.

One way: targets → handlers → bodies → cpu_kernels, all on frame (the call frame) and pool (threads); abi says whether
the structs that they read are those of this jaxlib.
"""
