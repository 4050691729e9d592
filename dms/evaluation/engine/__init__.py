"""Running an evaluation: settings, units of work, decoding, scores."""
