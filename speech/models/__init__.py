"""Architectures of speech models, one family a file."""
