"""Files: checkpoints, gates files, weights, model folders and base models."""
