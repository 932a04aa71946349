"""Leave to use the matrix units of Intel's processors (AMX): Linux gives it to processes that ask."""

import ctypes
import platform
import sys
from functools import cache
from typing import Final

__all__ = ["permitted"]

# Of arch/x86/include/uapi/asm/prctl.h and of the processor's state components.
_ARCH_PRCTL: Final = 158
_ARCH_REQ_XCOMP_PERM: Final = 0x1023
_XTILEDATA: Final = 18


@cache
def permitted() -> bool:
    """Whether this process, with all its threads and forks, may use the tiles' registers, having asked for it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0
