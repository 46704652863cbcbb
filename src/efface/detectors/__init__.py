"""What says whether something is in a picture. `eyes` is the file `eyes.py` and the one class in its `__all__`.

A detector looks at a picture once and decides from what it saw; looks are kept for pictures seen lately, so that
several questions cost one look. It never swallows an error: a picture that cannot be judged stops the judging, it is
not "safe".

Another package adds a detector by an entry point, see `efface.registry`. Its class is a dataclass with a field `names`,
what to look for; its other fields are the options. `Looking` is a base for it, but any `efface.Detector` will do.
"""
