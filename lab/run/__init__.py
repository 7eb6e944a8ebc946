"""One run: its flags, seeds, device, processes, progress, checkpoints and record."""
