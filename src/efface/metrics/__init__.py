"""What is measured. `removal` is the file `removal.py` and the one class in its `__all__`; its objects are `Metric`s.

A metric with no row to measure returns no score; a number that is not defined is NaN, never a perfect one. What a
metric needs and does not find (a package, weights, a picture) is an error.
"""
