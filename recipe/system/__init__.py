"""The ground floor: errors, files, seeds, processes, memory. Imports nothing else of the recipe."""
