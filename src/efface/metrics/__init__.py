"""The metrics. `removal` is the file `removal.py` and the one class in its `__all__`, a `Metric`.

A metric without rows to measure returns no score. An undefined number is NaN, never a perfect score. A missing package,
weight file or picture raises an error.
"""
