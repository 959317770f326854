"""Windows rebuilt from themselves: missing values filled in, and rows scored by how little they fit."""
