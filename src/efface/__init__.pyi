"""The public names of `efface`, and the only list of them: `__init__.py` and type checkers both read this file."""

__version__: str

from .api import active as active
from .api import concept as concept
from .api import concepts as concepts
from .api import conditional_rows as conditional_rows
from .api import erase as erase
from .api import stack as stack
from .calibration import calibrate as calibrate
from .core import Concept as Concept
from .core import Detector as Detector
from .core import Editor as Editor
from .core import Eraser as Eraser
from .core import Handle as Handle
from .delta import Delta as Delta
from .delta import Directions as Directions
from .detectors._named import detector as detector
from .editors.ccrt import CCRT as CCRT
from .editors.esd import ESD as ESD
from .editors.latent_directions import LatentDirections as LatentDirections
from .editors.rece import RECE as RECE
from .editors.sdd import SDD as SDD
from .editors.uce import UCE as UCE
from .erasers.eiup import EIUP as EIUP
from .erasers.gie import GIE as GIE
from .erasers.nag import NAG as NAG
from .erasers.negative_prompt import NegativePrompt as NegativePrompt
from .erasers.safree import SAFREE as SAFREE
from .erasers.sld import SLD as SLD
from .pictures import grid as grid
from .pipelines import effectiveness as effectiveness
from .pipelines import load as load
from .records import Metric as Metric
from .records import Row as Row
from .records import Sample as Sample
from .records import Score as Score
from .records import Suite as Suite
from .report import write_report as write_report
from .runs import Run as Run
from .runs import make_suite as make_suite
from .runs import run as run
from .runs import score as score
from .runs import verify as verify
from .tables import table as table
