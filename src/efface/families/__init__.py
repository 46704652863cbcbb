"""All that differs between models: one file per family, found by walking; and what methods and families have in common.

A new family is one file here and a tiny pipeline in the tests. A method says what it needs, a family what it offers;
refusals and tables are computed from the two.
"""

from __future__ import annotations

from ._defaults import filled, uncalibrated
from ._find import FAMILIES, denoiser_name, family
from ._needs import Form, about, check, forms, lacking, matrix, refusal, what_works
from ._offers import OFFERS, Offer
from ._parts import Reading, encode_parameters, encoder_name
from .base import Family

__all__ = [
    "FAMILIES",
    "OFFERS",
    "Family",
    "Form",
    "Offer",
    "Reading",
    "about",
    "check",
    "denoiser_name",
    "encode_parameters",
    "encoder_name",
    "family",
    "filled",
    "forms",
    "lacking",
    "matrix",
    "refusal",
    "uncalibrated",
    "what_works",
]
