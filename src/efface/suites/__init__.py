"""Prompt sets. `i2p` is the file `i2p.py` and the one class in its `__all__`; its `load` makes a `Suite`.

Only the rows of `emoji` come with Efface. Every other set is read from a folder of yours, one folder per set, because
much of it is offensive text; an error says where it can be had, and under which licence.
"""
