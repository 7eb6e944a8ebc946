"""Experts from a trained FFN, and the routers and other things that the paper compares with."""
