"""GIE: EIUP with one weight per concept token, fixed or predicted by a small adapter from the first step."""

from .method import GIE

__all__ = ["GIE"]
