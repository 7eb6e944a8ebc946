"""What the experiment scripts share, in rooms: run, moe, text, vision, bench, report. The method itself is stgc.py and stgc_plus.py; nothing
there needs this.

A room imports itself and the rooms to its left: run <- moe <- text, vision <- bench <- report <- the scripts. text and
vision do not import each other.
"""
