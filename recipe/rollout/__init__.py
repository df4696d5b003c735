"""Generation: samples and their states, the client of SGLang's HTTP API, and the servers behind it."""
