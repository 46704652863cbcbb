"""A user's own prompts: three forms of file, errors with line numbers, bounded memory."""

from __future__ import annotations

import json
import socket
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import efface
from efface import Concept, _hub
from efface.records import Row, alike
from efface.suites import _own, prompts
from efface.suites.prompts import Prompts

CAT, DOG = Concept("cat"), Concept("dog")
SECRET = "unspeakable"


def file(folder: Path, content: str | bytes, name: str = "mine.csv") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_three_forms_of_file_make_the_same_rows(tmp_path: Path) -> None:
    csv = 'prompt,concept,kind,seed,keep\n"a cat, on a mat",cat,explicit,7,mat; hat\na tree,,,,\n'
    lines = [
        {"prompt": "a cat, on a mat", "concept": "cat", "kind": "explicit", "seed": 7, "keep": ["mat", "hat"]},
        {"prompt": "a tree"},
    ]
    jsonl = "".join(json.dumps(line) + "\n" for line in lines)
    one, two = (
        Prompts().load((), file(tmp_path, content, f"x.{form}")).rows
        for form, content in (("csv", "\ufeff" + csv), ("jsonl", jsonl))
    )
    strip = [[(r.prompt, r.concept, r.kind, r.seed, r.keep) for r in rows] for rows in (one, two)]
    assert (
        strip[0]
        == strip[1]
        == [
            ("a cat, on a mat", "cat", "explicit", 7, ("mat", "hat")),
            ("a tree", "", "benign", 1_000_001, ()),
        ]
    )
    (bare,) = Prompts().load((CAT,), file(tmp_path, "\n  a cat  \n\n", "x.txt")).rows
    assert (bare.id, bare.prompt, bare.concept, bare.kind) == ("line-2", "a cat", "cat", "own")


def test_pictures_of_a_prompt_are_a_cluster_with_consecutive_seeds(tmp_path: Path) -> None:
    rows = Prompts(images=3).load((CAT,), file(tmp_path, "a cat\nmy cat\n", "x.txt")).rows
    assert [row.seed for row in rows] == list(range(1_000_000, 1_000_006))
    assert Counter(row.cluster for row in rows) == {"line-1": 3, "line-2": 3} and len({row.id for row in rows}) == 6


def test_concepts_choose_the_lines_and_a_limit_takes_all_alike(tmp_path: Path) -> None:
    lines = [f"a {c} {k},{c}\n" for c in ("cat", "dog", "hat") for k in range(40)]
    path = file(tmp_path, "prompt,concept\n" + "".join(lines))
    rows = Prompts().load((CAT, DOG), path).rows
    assert Counter(row.concept for row in rows) == {"cat": 40, "dog": 40}
    assert Prompts().load((CAT, DOG), path).version.endswith("from seed 1000000, 40 of other concepts left out")
    assert len(Prompts().load((), path).rows) == 120
    some = Prompts().load((CAT, DOG), path, 7)
    assert Counter(row.concept for row in some.rows) == {"cat": 4, "dog": 3} and "7 of 80 rows" in some.version
    assert list(some.rows) == list(alike(rows, 7))  # without keeping all of them
    assert some.data_hash == Prompts().load((), path).data_hash != ""
    with pytest.raises(ValueError, match="holds no prompt of bird"):
        Prompts().load((Concept("bird"),), path)
    bare = file(tmp_path, "a cat\n", "x.txt")
    with pytest.raises(ValueError, match="a column `concept` in .* for 2 concepts"):
        Prompts().load((CAT, DOG), bare)


@given(st.integers(1, 60), st.integers(1, 60))
def test_evenly_spread_items_are_those_of_the_formula(n: int, count: int) -> None:
    count = min(n, count)
    assert [k for k in range(n) if prompts._spread(k, n, count)] == sorted({j * n // count for j in range(count)})


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.csv", "prompt,seed\na cat,1\na cat,-1\n", "line 3, `seed`: expected a whole number"),
        ("x.csv", "prompt,seed\na cat,99999999999\n", "line 2, `seed`"),
        ("x.csv", f"prompt,seed\n{SECRET},1,2\n", "line 2: expected 2 fields, got 3"),
        ("x.csv", f'prompt\n"{SECRET}', "line 2: not a CSV record"),
        ("x.csv", 'prompt\n"a\nb"\n,b\n', "line 4: expected 1 fields, got 2"),
        ("x.csv", f"{SECRET}\na cat\n", "a header with the column `prompt` once in line 1"),
        ("x.csv", "prompt,prompt\na,b\n", "a header with the column `prompt`"),
        ("x.csv", "", "a header with the column `prompt` once in line 1"),
        ("x.csv", "prompt\n", "holds no prompt"),
        ("x.txt", "\n \n", "holds no prompt"),
        ("x.csv", "prompt,concept\n ,cat\n", "line 2, `prompt`: expected a text, got an empty one"),
        ("x.txt", f"a cat\n{SECRET} café\n".encode("latin-1"), "line 2: the line is not UTF-8"),
        ("x.csv", "prompt\na cat\n".encode("utf-16"), "line 1: the line is not UTF-8. Save the file as UTF-8"),
        ("x.csv", "prompt;concept\na cat;cat\n", "with commas between them"),
        ("x.txt", "a cat\n".encode("utf-16-le"), "line 1: the line holds zero bytes. Save the file as UTF-8"),
        ("x.txt", f"a cat\r{SECRET}\r", "line 1: the line holds a carriage return"),
        ("x.csv", f'prompt\na cat\n"{SECRET}\ra"\n', "line 3: the line holds a carriage return"),
        ("x.csv", f"prompt,concept\n{SECRET},dog\n{SECRET},CAT\n", "line 3, `concept`: expected 'cat', got 'CAT'"),
        ("x.txt", "a " * 40_000, "line 1: the line has over 65536 bytes"),
        ("x.jsonl", '{"prompt": "a cat"}\n[1]\n', "line 2: expected an object"),
        ("x.jsonl", '{"prompt": 3}\n', "line 1, `prompt`: expected a text, got a int"),
        ("x.jsonl", '{"prompt": "a cat", "keep": "mat"}\n', "line 1, `keep`: expected a list"),
        ("x.jsonl", '{"prompt": "a cat", "seed": true}\n', "line 1, `seed`"),
        ("x.jsonl", '{"prompt": "a cat"\n', "line 1"),
        ("x.jsonl", "[" * 50_000, "line 1"),
        ("x.parquet", "a cat", r"ends in \.csv, \.jsonl, \.txt"),
    ],
)
def test_what_is_wrong_is_named_by_its_line_and_no_prompt_is_quoted(
    name: str, content: str | bytes, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        Prompts().load((CAT,), file(tmp_path, content, name))
    said = str(caught.value)
    assert SECRET not in said and said.endswith(".") and len(said) < 500


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Prompts().load((CAT,), tmp_path / "x.csv")
    with pytest.raises(ValueError, match="needs your file of prompts"):
        Prompts().load((CAT,))
    (tmp_path / "y.csv").mkdir()
    with pytest.raises(ValueError, match="y.csv"):
        Prompts().load((CAT,), tmp_path / "y.csv")


@pytest.mark.long
def test_a_long_file_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST", 1_000)
    path = tmp_path / "long.txt"
    with path.open("w") as out:
        for k in range(60_000):
            out.write(f"a cat with the number {k} and a few more words\n")
    with pytest.raises(ValueError, match="holds 60000 prompts, which make 60000 rows. Expected at most 1000"):
        Prompts().load((CAT,), path)
    tracemalloc.start()
    rows = Prompts().load((CAT,), path, 10).rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.id for row in rows] == [f"line-{1 + k * 6_000}" for k in range(10)]
    assert peak < path.stat().st_size / 4  # a list of the lines would need more than the file


def test_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "GROUPS", 10)
    path = file(tmp_path, "prompt,category\n" + "".join(f"a cat,c{k}\n" for k in range(11)))
    with pytest.raises(ValueError, match="at most 10 combinations"):
        Prompts().load((), path)


def test_prompts_that_may_name_a_minor_are_dropped_from_sexual_concepts(tmp_path: Path) -> None:
    path = file(tmp_path, "prompt,concept\na portrait,nudity\na teenager,nudity\na teenager,cat\n")
    suite = Prompts().load((), path)
    assert [row.id for row in suite.rows] == ["line-2", "line-4"] and "1 dropped by the screen" in suite.version


def test_options_are_checked() -> None:
    for options in ({"images": 0}, {"first_seed": -1}, {"first_seed": 2**32}, {"detector": ""}):
        with pytest.raises(ValueError, match="Expected"):
            Prompts(**options)  # type: ignore[arg-type]
    assert _own.LONGEST >= 10_000


def test_own_prompts_are_a_suite_by_name(tmp_path: Path) -> None:
    suite = efface.make_suite("prompts", "cat", file(tmp_path, "a cat\n", "x.txt"), images=2)
    assert suite.name == "prompts" and [m.name for m in suite.metrics] == ["outcomes", "removal", "retention"]
    assert suite.rows[0] == Row("line-1-0", "a cat", 1_000_000, "own", "cat", "cat", (), "line-1")


# ---------------------------------------------------------------- datasets


def saved(folder: Path, form: str) -> Path:
    """A dataset of three prompts in a folder, and one of another split."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = {"prompt": ["a cat, on a mat", "a tree", "my cat"], "concept": ["cat", None, "cat"], "seed": [7, None, 9]}
    more = {"picture": [b"x"] * 3, "keep": [["mat"], [], []]}
    made = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows | more), test=datasets.Dataset.from_dict(rows))
    if form == "saved":
        made.save_to_disk(folder)
    elif form == "one":
        made["train"].save_to_disk(folder)
    else:
        folder.mkdir()
        for split in made:
            made[split].to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("form", ["saved", "one", "parquet"])
def test_a_dataset_in_a_folder_makes_the_rows_of_a_file(form: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "mine", form)
    suite = Prompts(dataset=str(folder)).load((CAT,))
    csv = file(tmp_path, 'prompt,concept,seed,keep\n"a cat, on a mat",cat,7,mat\na tree,,,\nmy cat,cat,9,\n')
    expected = Prompts().load((CAT,), csv).rows
    facts = [[(r.prompt, r.concept, r.kind, r.seed, r.keep) for r in rows] for rows in (suite.rows, expected)]
    assert facts[0] == facts[1] and len(facts[0]) == 3 and len(suite.data_hash) == 64
    assert suite.version.startswith("mine, train, 3 rows") and str(tmp_path) not in suite.version
    if form != "one":
        other = Prompts(dataset=str(folder), split="test").load((CAT,))
        assert other.data_hash != suite.data_hash and [row.keep for row in other.rows] == [(), (), ()]
        with pytest.raises(ValueError, match="a split of the dataset"):
            Prompts(dataset=str(folder), split="validation").load((CAT,))
    with pytest.raises(ValueError, match="a column of prompts in the dataset"):
        Prompts(dataset=str(folder), column="caption").load((CAT,))
    with pytest.raises(ValueError, match=r"row 1, `prompt`: expected a text, got a int"):
        Prompts(dataset=str(folder), column="seed").load((CAT,))


@pytest.mark.usefixtures("offline")
def test_a_dataset_of_the_hub_needs_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked: list[str] = []
    made = datasets.Dataset.from_dict({"prompt": ["a cat"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: [asked.append(name), made][1])
    with pytest.raises(ValueError, match="give --allow-hub"):
        Prompts(dataset="somebody/prompts").load((CAT,))
    assert not asked
    with _hub.allowing(True):
        assert [row.prompt for row in Prompts(dataset="somebody/prompts").load((CAT,)).rows] == ["a cat"]
    with pytest.raises(FileNotFoundError, match="neither a saved dataset nor Parquet"):
        Prompts(dataset=str(tmp_path)).load((CAT,))


def test_a_dataset_without_the_library_or_beside_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="got a dataset too"):
        Prompts(dataset="x").load((CAT,), file(tmp_path, "a cat\n", "x.txt"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        Prompts(dataset=str(tmp_path)).load((CAT,))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(ImportError, match="datasets 4 or later"):
        Prompts(dataset=str(tmp_path)).load((CAT,))
