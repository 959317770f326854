"""The shared core: ops, layers, catalogue, model folders. It knows no domain."""
