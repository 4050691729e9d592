"""Training data: where documents come from, and the sequences made of them."""
