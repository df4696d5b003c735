"""The smoke run: whether a node is good for training, by the whole loop on a small model (`python -m recipe.smoke`)."""
