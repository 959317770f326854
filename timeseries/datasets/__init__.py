"""Data that ships with the package: ETTh1, its bytes unchanged, with its licence beside it."""
