"""Graphs: molecules, citation graphs, and whatever has nodes and edges."""
