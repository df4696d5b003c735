"""A sample, and what an engine is asked and answers for it by SGLang's HTTP API."""
