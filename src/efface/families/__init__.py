"""The differences between models, with one file per family; and the facts that methods and families share.

A new family is one file here and a tiny pipeline in the tests. Methods declare needs, families declare offers; refusals
and tables follow from both.
"""

from __future__ import annotations

from ._defaults import filled, filled_for, uncalibrated
from ._find import FAMILIES, denoiser_name, family
from ._needs import Form, about, check, forms, lacking, matrix, refusal, what_works
from ._offers import OFFERS, Offer
from ._original import original_place
from ._parts import Reading, encode_parameters, encoder_name, tokenizer_of
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
    "filled_for",
    "forms",
    "lacking",
    "matrix",
    "original_place",
    "refusal",
    "tokenizer_of",
    "uncalibrated",
    "what_works",
]
