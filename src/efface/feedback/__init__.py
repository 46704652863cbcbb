"""People's judgements of pictures: how they are collected, stored and exchanged.

    judgement.py  one judgement, and its outcomes
    store.py      judgements in a database (needs the package sqlalchemy)
    jsonl.py      judgements out of a store and into one, as JSON lines
    session.py    what an annotator still has to judge, in a blind order
    sheets.py     numbered contact sheets with a file for the answers
    page.py       a local page with keys 1 to 3

Files of judgements may come from an untrusted source: see `forms.py` and `efface.files`.
"""

from .jsonl import export, load
from .judgement import LABELS, OUTCOMES, Judgement, annotator_name
from .session import FINAL, Item, Session, choose_pass, consensus, details_of, differing, independent
from .sheets import ANSWERS, judgements_of, read_sheets, write_sheets
from .store import Store

__all__ = [
    "ANSWERS",
    "FINAL",
    "LABELS",
    "OUTCOMES",
    "Item",
    "Judgement",
    "Session",
    "Store",
    "annotator_name",
    "choose_pass",
    "consensus",
    "details_of",
    "differing",
    "export",
    "independent",
    "judgements_of",
    "load",
    "read_sheets",
    "write_sheets",
]
