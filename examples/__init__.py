"""Real models written once in array-API code, running on quantized tensors of any array library."""
