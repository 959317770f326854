"""Graph models: one architecture family a file; plain modules over the core."""
