"""One table between Hugging Face's tensors and megatron's parameters, and what is derived from it."""
