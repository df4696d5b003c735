"""What the CUDA of this project needs of a machine."""

LEAST_DRIVER = 580
"""Major version of the NVIDIA driver that CUDA 13 needs (CUDA 13.0 release notes)."""
