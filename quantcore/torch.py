"""PyTorch modules with quantized weights; imports PyTorch when first used."""

from quantcore.doors import door

__getattr__, __dir__ = door("torch")
