"""Speed and memory of training, side by side."""
