"""The recommenders: plain modules, a family a file, and builders of numbers."""
