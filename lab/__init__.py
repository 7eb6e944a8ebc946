"""What the experiment scripts share, and what measures them. The method itself is stgc.py; nothing there needs this."""
