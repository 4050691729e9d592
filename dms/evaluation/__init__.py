"""Evaluation: planted tasks, policies at equal budget, result rows."""
