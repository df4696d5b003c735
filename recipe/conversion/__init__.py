"""Between Hugging Face's checkpoints and torch_dist, both ways, tensor by tensor and bit for bit."""
