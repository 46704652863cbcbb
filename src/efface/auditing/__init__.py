"""Audits a model that Efface did not edit: how often it draws concepts, beside a base model, and how sure that is."""

from .result import SETTING, Audit, opened
from .run import AUTO, audit

__all__ = ["AUTO", "SETTING", "Audit", "audit", "opened"]
