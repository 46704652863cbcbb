"""Prompt sets. `i2p` is the file `i2p.py` and the one class in its `__all__`, whose `load` makes a `Suite`.

Only the rows of `emoji` ship with Efface. The other sets contain offensive texts, so Efface reads them from folders of
yours, one per set. The error for a missing set names its source and licence.
"""
