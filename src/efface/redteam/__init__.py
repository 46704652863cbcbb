"""Runs attacks, and judges their pictures. The attacks themselves are in `efface.attacks`."""

from ..attacks._contract import ACCESS, Access, Attack, Cost, Proposal, Target, Victim
from .folder import opened
from .result import AttackResult, Share, masking
from .run import attack, build, check_access, default_prompts

__all__ = [
    "ACCESS",
    "Access",
    "Attack",
    "AttackResult",
    "Cost",
    "Proposal",
    "Share",
    "Target",
    "Victim",
    "attack",
    "build",
    "check_access",
    "default_prompts",
    "masking",
    "opened",
]
