"""Speech: separation and recognition."""
