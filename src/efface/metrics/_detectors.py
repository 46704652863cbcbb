"""The earlier address of `efface.detectors.nudenet`: the same module, so that what is set here is set there."""

import sys

from efface.detectors import nudenet

sys.modules[__name__] = nudenet
