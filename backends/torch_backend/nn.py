"""What is behind ``quantcore.torch``: layers with quantized weights, and putting them into a model."""

from quantcore_backends.torch_backend.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from quantcore_backends.torch_backend.replacing import LayerReport, QuantizationReport, quantize_module

__all__ = [
    "LayerReport",
    "QuantizationReport",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "quantize_module",
]
