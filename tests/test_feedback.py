"""Judgements are kept whatever happens, and come back as they went in."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from efface.feedback import Judgement, Store, consensus, export, load

RUN, PICTURE = "a" * 64, "b" * 64
SEEN = Judgement(RUN, "c" * 64, "cat-0", PICTURE, "cat", "ana", 1, "there", "2026-01-01T00:00:00+00:00")


def of(k: int, outcome: str = "there", annotator: str = "ana", number: int = 1) -> Judgement:
    details = {"stratum": "positive", "of": 3, "drawn": 3}
    return replace(SEEN, row=f"cat-{k}", outcome=outcome, annotator=annotator, number=number, details=details)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "labels.db")


def test_a_store_gives_back_what_it_got_to_every_reader(store: Store, tmp_path: Path) -> None:
    given = [of(0), of(1, "other"), of(0, "nothing", "ben", 2)]
    given += [
        replace(SEEN, kind="binary", outcome="yes"),
        replace(SEEN, kind="ranking", outcome="x", details={"set": 4}),
    ]
    assert store.add(given) == 5
    again = Store(tmp_path / "labels.db", create=False)
    assert again.judgements() == given and [each.details for each in again.judgements()] == [e.details for e in given]
    assert again.judgements(kind="label", annotator="ben") == [given[2]] == again.judgements(number=2)
    assert Store(f"sqlite:///{tmp_path}/labels.db").judgements(concept="dog") == []


def test_the_database_flushes_every_commit(store: Store, tmp_path: Path) -> None:
    with store._transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_change_of_mind_replaces_only_where_it_is_asked_for(store: Store) -> None:
    store.add([of(0), of(1)])
    assert store.add([of(0), of(1)]) == 0
    with pytest.raises(
        ValueError, match=r"row 'cat-1' to be 'there' as in the store, got 'other' from 'ana' in pass 1"
    ):
        store.add([of(2), of(1, "other")])
    assert store.judgements() == [of(0), of(1)]  # all or none
    assert store.add([of(1, "other")], replace=True) == 1
    assert store.judgements() == [of(0), of(1, "other")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"outcome": "perhaps"}, "`outcome` to be one of 'there', 'other', 'nothing', got 'perhaps'"),
        ({"kind": "binary"}, "`outcome` to be one of 'yes', 'no'"),
        ({"kind": "vote"}, "`kind` to be one of"),
        ({"number": 0}, "`pass` >= 1, got 0"),
        ({"picture": "b" * 63}, "`picture` to be a SHA-256"),
        ({"run": "B" * 64}, "`run` to be a SHA-256"),
        ({"annotator": "a\nb"}, "`annotator` to be one line"),
        ({"annotator": " "}, "`annotator` to be a text that is not empty"),
        ({"annotator": "a" * 201}, "of at most 200 characters"),
    ],
)
def test_what_is_no_judgement_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SEEN, **wrong)


WRITER = """
import sys
from dataclasses import replace
sys.path.insert(0, {tests!r})
from test_feedback import Store, of
store = Store({path!r})
for k in range(100_000):
    store.add([of(k)])
    print(k, flush=True)
"""


def test_a_kill_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    path = str(tmp_path / "labels.db")
    code = WRITER.format(tests=str(Path(__file__).parent), path=path)
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(30)]
    os.kill(writer.pid, signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().splitlines() if line.isdecimal()]
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    kept = Store(path, create=False).judgements()
    assert len(kept) >= len(told) >= 30 and kept == [of(k) for k in range(len(kept))]
    assert len(kept) <= len(told) + 1  # at most the one that was stored and not yet reported
    assert Store(path).add([of(10**6)]) == 1


def test_a_store_that_another_process_holds_is_an_error_after_a_bounded_wait(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels.db", wait=0.3)
    store.add([of(0)])
    holder = sqlite3.connect(tmp_path / "labels.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(BlockingIOError, match=r"Another process holds the store .*labels\.db, also after 0\.3 seconds"):
        store.add([of(1)])
    assert 0.25 < time.monotonic() - began < 3
    assert store.judgements() == [of(0)]  # reading does not wait
    holder.execute("COMMIT")
    assert store.add([of(1)]) == 1


def test_threads_share_a_store(store: Store) -> None:
    threads = [threading.Thread(target=store.add, args=([of(k)],)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.row for each in store.judgements()} == {f"cat-{k}" for k in range(12)}


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no store .*absent\.db\. `efface judge label` and"):
        Store(tmp_path / "absent.db", create=False)
    assert not (tmp_path / "absent.db").exists()
    (tmp_path / "text.db").write_text("precious " * 200)
    with pytest.raises(ValueError, match=r"text\.db is not a store of judgements"):
        Store(tmp_path / "text.db")
    assert (tmp_path / "text.db").read_text() == "precious " * 200
    with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
        Store(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is not a folder, so .*labels\.db cannot be made"):
        Store(tmp_path / "nowhere/labels.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE judgements (id INTEGER)")
    other.close()
    with pytest.raises(
        ValueError, match=r"is not a store of this version of Efface, because the columns of `judgements`"
    ):
        Store(tmp_path / "other.db")
    sqlite3.connect(tmp_path / "empty.db").close()
    (tmp_path / "empty.db").touch()
    with pytest.raises(ValueError, match="is not a store of judgements"):
        Store(tmp_path / "empty.db", create=False)
    with pytest.raises(ValueError, match="Expected a store that SQLAlchemy can open"):
        Store("nosuch://user:secret@host/x")


def test_a_message_does_not_show_a_password() -> None:
    with pytest.raises(ValueError, match="Give a file, or a URL") as caught:
        Store("nosuch://user:secret@host/x")
    assert "secret" not in str(caught.value)


def test_without_sqlalchemy_the_message_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efface.feedback import store

    store._sql.cache_clear()
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(ImportError, match=r'pip install "efface\[feedback\]"'):
        Store(tmp_path / "labels.db")
    store._sql.cache_clear()


HARMED = [("outcome", "perhaps"), ("details", "["), ("details", "[1]"), ("pass", 0), ("run", "x"), ("kind", "vote")]


@pytest.mark.parametrize(("column", "value"), HARMED)
def test_a_damaged_row_of_a_store_is_named(column: str, value: object, store: Store, tmp_path: Path) -> None:
    store.add([of(0), of(1)])
    with sqlite3.connect(tmp_path / "labels.db") as connection:
        connection.execute(f'UPDATE judgements SET "{column}" = ? WHERE id = 2', (value,))
    with pytest.raises(ValueError, match=r"labels\.db, judgement 2 is damaged|to be one of"):
        store.judgements()


@pytest.mark.parametrize("sample", ["[", "[]", "{}", '{"rows": {"a": ["b", "other"]}}'])
def test_a_damaged_sample_of_a_store_is_named(sample: str, store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "labels.db") as connection:
        connection.execute("INSERT INTO samples VALUES (?, 'cat', ?)", (RUN, sample))
    with pytest.raises(ValueError, match=r"labels\.db, the sample of 'cat' is damaged"):
        store.sample(RUN, "cat")


# ---------------------------------------------------------------- out and in


def test_lines_go_out_and_come_in_once(store: Store, tmp_path: Path) -> None:
    given = [of(0), of(1, "other"), of(0, "nothing", "ben", 2), replace(SEEN, kind="ranking", outcome="3")]
    store.add(given)
    assert export(store, tmp_path / "a.jsonl") == 4
    other = Store(tmp_path / "other.db")
    assert load(other, tmp_path / "a.jsonl") == 4 and other.judgements() == given
    assert load(other, tmp_path / "a.jsonl") == 0 and other.judgements() == given
    export(other, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


BAD = {
    "not JSON": ("{", "because it is not JSON"),
    "cut off": (json.dumps(of(5).record())[:-9], "because it is not JSON"),
    "another outcome": (json.dumps(of(5).record() | {"outcome": "perhaps"}), "`outcome` to be one of"),
    "an unknown kind": (json.dumps(of(5).record() | {"kind": "vote"}), "expected `kind` to be"),
    "an unknown field": (json.dumps(of(5).record() | {"note": 1}), "`note`"),
    "a hash": (json.dumps(of(5).record() | {"picture": "b" * 63}), "expected `picture` to be"),
    "pass 0": (json.dumps(of(5).record() | {"pass": 0}), "expected `pass` to be"),
    "a text as pass": (json.dumps(of(5).record() | {"pass": "1"}), "expected `pass` to be"),
    "no time": (json.dumps({k: v for k, v in of(5).record().items() if k != "time"}), "has no `time`"),
    "a list": ("[]", "expected it to be"),
    "a contradiction in the store": (json.dumps(of(0, "nothing").record()), "to be 'there' as in the store"),
    "a contradiction in the file": (json.dumps(of(3, "nothing").record()), "to be 'other' as in the store"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_with_its_number_and_nothing_is_lost(name: str, store: Store, tmp_path: Path) -> None:
    store.add([of(0)])
    line, message = BAD[name]
    good = [json.dumps(of(k, "other").record()) for k in (3, 4)]
    (tmp_path / "in.jsonl").write_text("\n".join([*good, "", line, *good]) + "\n")
    with pytest.raises(ValueError, match=r"in\.jsonl, line 4") as caught:
        load(store, tmp_path / "in.jsonl")
    assert message in str(caught.value)
    assert store.judgements() == [of(0)]


def test_at_least_half_decide_and_ties_are_cautious() -> None:
    assert consensus(["there", "nothing"]) == consensus(["nothing", "there"]) == "there"
    assert consensus(["other", "nothing"]) == "other"
    assert consensus(["there", "nothing", "nothing"]) == "nothing"
    assert consensus(["there", "other", "nothing"]) == "other"  # two of three do not see it
