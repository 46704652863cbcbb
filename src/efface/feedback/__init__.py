"""People's judgements of pictures: how they are collected, stored and exchanged.

    judgement.py  one judgement, and its outcomes
    store.py      judgements in a database (needs the package sqlalchemy)
    jsonl.py      judgements out of a store and into one, as JSON lines
    session.py    what an annotator still has to judge, in a blind order
    pool.py       the pictures of a folder, to judge
    sheets.py     numbered contact sheets with a file for the answers
    page.py       a local page with keys
    agreement.py  how well people agree
    evidence.py   what judgements say about pictures, as a reward model learns it
    networks.py   folds, training and held-out results of the reward model (loads torch)
    reward.py     the reward model (loads torch)
    figure.py     its calibration as a figure

Files of judgements may come from an untrusted source: see `forms.py` and `efface.files`.
"""

from .agreement import agreement_facts
from .evidence import Evidence
from .jsonl import export, load
from .judgement import LABELS, OUTCOMES, Judgement, annotator_name
from .pool import pool
from .session import FINAL, Item, Ranking, Session, choose_pass, consensus, details_of, differing, independent
from .sheets import ANSWERS, Layout, judgements_of, read_sheets, write_sheets
from .store import Store

__all__ = [
    "ANSWERS",
    "FINAL",
    "LABELS",
    "OUTCOMES",
    "Evidence",
    "Item",
    "Judgement",
    "Layout",
    "Ranking",
    "Session",
    "Store",
    "agreement_facts",
    "annotator_name",
    "choose_pass",
    "consensus",
    "details_of",
    "differing",
    "export",
    "independent",
    "judgements_of",
    "load",
    "pool",
    "read_sheets",
    "write_sheets",
]
