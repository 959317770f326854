"""The image models, one family a file; plain modules without lightning."""
