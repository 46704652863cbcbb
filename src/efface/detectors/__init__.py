"""Detectors of concepts in pictures. `eyes` is the file `eyes.py` and the one class in its `__all__`.

A detector evaluates a picture once, and answers several questions from the cached result. It never hides an error: a
picture that cannot be judged raises, and does not count as safe.

Other packages add detectors by an entry point, see `efface.registry`. The class is a dataclass with a field `names`,
the things to detect; its other fields are options. `Looking` is an optional base class: any `efface.Detector` works.
"""
