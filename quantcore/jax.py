"""What is particular to JAX; imports JAX when first used."""

from quantcore.doors import door

__getattr__, __dir__ = door("jax")
