"""Recorded runs: comparison, figures, claims, and the tables of README and docs/."""
