"""How a sample comes of an engine's turns: by one, or by a function of the user's."""
