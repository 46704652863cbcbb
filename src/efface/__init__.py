"""Erase concepts from text-to-image diffusion models.

    import efface

    pipe = efface.load("emoji")
    with efface.erase(pipe, "alcohol"):
        images = pipe("a night at the pub").images

The names below are imported on first use: `import efface` alone loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efface.api import active, concept, concepts, conditional_rows, effectiveness, erase, load, stack
    from efface.calibration import calibrate
    from efface.core import Concept, Detector, Editor, Eraser, Handle, Metric, Row, Sample, Score, Suite
    from efface.delta import Delta
    from efface.editors.ccrt import CCRT
    from efface.editors.esd import ESD
    from efface.editors.rece import RECE
    from efface.editors.sdd import SDD
    from efface.editors.uce import UCE
    from efface.erasers.eiup import EIUP
    from efface.erasers.gie import GIE
    from efface.erasers.negative_prompt import NegativePrompt
    from efface.erasers.safree import SAFREE
    from efface.erasers.sld import SLD
    from efface.metrics._detectors import detector
    from efface.report import write_report
    from efface.runs import Run, make_suite, run, score

__version__ = "0.1.0"

__all__ = [
    "CCRT",
    "EIUP",
    "ESD",
    "GIE",
    "RECE",
    "SAFREE",
    "SDD",
    "SLD",
    "UCE",
    "Concept",
    "Delta",
    "Detector",
    "Editor",
    "Eraser",
    "Handle",
    "Metric",
    "NegativePrompt",
    "Row",
    "Run",
    "Sample",
    "Score",
    "Suite",
    "__version__",
    "active",
    "calibrate",
    "concept",
    "concepts",
    "conditional_rows",
    "detector",
    "effectiveness",
    "erase",
    "load",
    "make_suite",
    "run",
    "score",
    "stack",
    "write_report",
]

_HOME = {
    "CCRT": "efface.editors.ccrt",
    "ESD": "efface.editors.esd",
    "SDD": "efface.editors.sdd",
    "EIUP": "efface.erasers.eiup",
    "SAFREE": "efface.erasers.safree",
    "SLD": "efface.erasers.sld",
    "RECE": "efface.editors.rece",
    "UCE": "efface.editors.uce",
    "GIE": "efface.erasers.gie",
    "Concept": "efface.core",
    "Delta": "efface.delta",
    "Detector": "efface.core",
    "Editor": "efface.core",
    "Eraser": "efface.core",
    "Handle": "efface.core",
    "Metric": "efface.core",
    "NegativePrompt": "efface.erasers.negative_prompt",
    "Row": "efface.core",
    "Run": "efface.runs",
    "Sample": "efface.core",
    "Score": "efface.core",
    "Suite": "efface.core",
    "active": "efface.api",
    "calibrate": "efface.calibration",
    "concept": "efface.api",
    "concepts": "efface.api",
    "conditional_rows": "efface.api",
    "detector": "efface.metrics._detectors",
    "effectiveness": "efface.api",
    "erase": "efface.api",
    "load": "efface.api",
    "make_suite": "efface.runs",
    "run": "efface.runs",
    "score": "efface.runs",
    "stack": "efface.api",
    "write_report": "efface.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'efface' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
