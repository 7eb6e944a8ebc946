"""Recorded runs: comparison, figures, and README's tables."""
