"""The recipe's image: building it, running commands in it, and what it knows of itself.

Needs a container engine and the docker package, on the outside only; neither is imported before it is used.
"""
