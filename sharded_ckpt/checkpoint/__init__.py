"""The files of a checkpoint: index, headers, reading, writing, publishing. Knows nothing of models."""
