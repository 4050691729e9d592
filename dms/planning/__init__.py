"""What a retrofit takes before anything is spent: parameters, FLOPs, bytes, seconds, from a configuration alone."""
