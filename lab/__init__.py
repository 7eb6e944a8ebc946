"""What the experiment scripts share, in rooms: run, moe, text, vision, bench, report. The method itself is in stgc.py and
stgc_plus.py, which need nothing of this.

A room imports itself and the rooms to its left: run <- moe <- text, vision <- bench <- report <- the scripts. text and
vision do not import each other.
"""
