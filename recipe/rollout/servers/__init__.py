"""Servers behind SGLang's HTTP API: SGLang itself, and the embedded engine for machines without a GPU."""
