"""Writing down what is said: data, training, long files, subtitles, streams."""
