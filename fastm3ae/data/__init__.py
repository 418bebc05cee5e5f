"""Data: arrow files of image-text pairs, their preparation, and batches of model inputs."""
