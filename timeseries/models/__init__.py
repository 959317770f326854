"""Plain `nn.Module` forecasters, one architecture family a file."""
