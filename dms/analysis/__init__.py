"""What inference takes, from shapes alone: FLOPs, bytes, the roofline, and where reading the KV cache overtakes reading weights."""
