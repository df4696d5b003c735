"""Servers behind SGLang's HTTP API and how one is launched: SGLang itself, and the embedded engine, which needs no
GPU."""
