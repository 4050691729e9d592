"""What training and inference cost: FLOPs, bytes, seconds, on which hardware."""
