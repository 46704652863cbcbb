"""Reads prompts from a dataset of the library `datasets`: from a folder, or from the hub if that is allowed."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from efface import checks, files
from efface._hub import allowed

from ._own import COLUMNS, Prompt, checked

OLDEST = 4
"""The first version that never runs code of a dataset."""
SAVED = ("state.json", "dataset_dict.json")


def rows(name: str, split: str, column: str) -> Iterator[Prompt]:
    """The prompts of a dataset, one after the other. Row k has the number k, from 1.

    Args:
        name: a folder that `save_to_disk` wrote or that holds Parquet files; or a name on the hub.
        split: its split.
        column: its column of prompts. Columns named as those of a prompt file are read too.

    Raises:
        ImportError: `datasets` is not installed, or older than 4.
        ValueError: the hub is not allowed; there is no such split or column; or a row is not of that form.
        FileNotFoundError: there is no such dataset.
    """
    found = _opened(name, split)
    names = found.column_names or list(next(iter(found), {}))
    if column not in names:
        cure = f"Choose one of its columns: {checks.short(', '.join(names))}."
        raise ValueError(checks.refusal(f"a column of prompts in the dataset {checks.short(name)!r}", column, cure))
    wanted = [each for each in COLUMNS[1:] if each in names and each != column]
    some: Iterable[Mapping[str, Any]] = found.select_columns([column, *wanted])
    for number, row in enumerate(some, 1):
        values = {each: row[each] for each in wanted} | {"prompt": row[column]}
        yield checked(f"{name}, row {number}", number, values)


def _opened(name: str, split: str) -> Any:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError("A dataset needs the package datasets. Install it with pip install datasets.") from error
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        raise ImportError(
            f"Expected datasets {OLDEST} or later, which runs no code of a dataset, got {datasets.__version__}. Update "
            "it with pip install -U datasets."
        )
    folder = Path(name)
    if not folder.is_dir():
        if not allowed():
            cure = "Name a folder, or give --allow-hub to read the dataset from the hub."
            raise ValueError(checks.refusal("the folder of a dataset", name, cure))
        return datasets.load_dataset(name, split=split, streaming=True)
    if any(files.there(folder / each) for each in SAVED):
        saved = datasets.load_from_disk(str(folder))
        return _split(saved, name, split) if isinstance(saved, dict) else saved
    tables = sorted(map(str, itertools.chain(folder.glob("*.parquet"), folder.glob("*/*.parquet"))))
    if not tables:
        raise FileNotFoundError(f"{name} holds neither a saved dataset nor Parquet files. Name another folder.")
    mine = [each for each in tables if split in Path(each).name]
    if not mine and split != "train":
        cure = "Name a part of the files' names, or leave it out."
        raise ValueError(checks.refusal(f"a split of the dataset {checks.short(name)!r}", split, cure))
    mine = mine or tables
    return datasets.load_dataset("parquet", data_files=mine, split="train", streaming=True)


def _split(saved: Mapping[str, Any], name: str, split: str) -> Any:
    if split not in saved:
        cure = f"Choose one of {', '.join(saved)}."
        raise ValueError(checks.refusal(f"a split of the dataset {checks.short(name)!r}", split, cure))
    return saved[split]
