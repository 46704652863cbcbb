"""A conformance kit for run-time methods, provisional until version 1.0. `import efface` does not load it.

    import efface.testing

    print(efface.testing.check(Mine("cat")))

`check` tries what every method promises (`conformance`) on tiny random pipelines (`tiny`), which need no download and
no GPU. In pytest, parametrise over `checks()`. The kit needs what Efface itself needs, and no test framework.
"""

from .conformance import ConformanceError, DoesNotApply, Trial
from .drawing import change, drawn, latents
from .kit import Check, Finding, Report, check, checks
from .tiny import FAMILIES, pipeline

__all__ = [
    "FAMILIES",
    "Check",
    "ConformanceError",
    "DoesNotApply",
    "Finding",
    "Report",
    "Trial",
    "change",
    "check",
    "checks",
    "drawn",
    "latents",
    "pipeline",
]
