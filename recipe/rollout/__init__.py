"""Generation: samples and their states, and the client of SGLang's HTTP API."""
