"""A plugin that is broken on purpose: one of its hooks hasn't the signature that it must have."""

from typing import Any

from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl

__all__ = ["backend"]


class WrongSignature:
    """Lacks `precision` in `dot`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        """Describe the backend."""
        return BackendInfo(
            api_version=1,
            name="thirdparty_wrong_signature",
            library="numpy",
            array_types=("numpy:ndarray",),
            priority=1_000_000,
        )

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        """Everything."""
        return True

    @hookimpl
    def quantize(self, w: Any, scheme: Scheme) -> Any:
        """Never called."""
        raise NotImplementedError

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Any:
        """Never called."""
        raise NotImplementedError

    @hookimpl
    def dot(self, x: Any, qw: QuantizedTensor, dtype: str) -> Any:
        """Never called."""
        raise NotImplementedError


backend = WrongSignature()
