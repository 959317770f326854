"""Where a job's shards run: one file an engine."""
