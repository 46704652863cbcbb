"""A conformance kit for run-time methods, provisional until version 1.0. `import efface` does not load it.

    import efface.testing

    print(efface.testing.check(Mine("cat")))

`check` tests the promises of every method (`conformance`) on tiny random pipelines (`tiny`), without download or GPU.
In pytest, parametrise over `checks()`. The kit needs no test framework and no packages besides Efface's.
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
