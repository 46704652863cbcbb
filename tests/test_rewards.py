"""People say with pictures what must go, and a reward model learns it from what it did not see."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_cli import call
from test_report import CHROMIUM, FLAGS
from torch import Tensor

from efface import api, files
from efface.detectors import _encoders
from efface.feedback import (
    Evidence,
    Judgement,
    Ranking,
    Session,
    Store,
    agreement_facts,
    judgements_of,
    pool,
    read_sheets,
    write_sheets,
)
from efface.feedback.figure import calibration_svg
from efface.feedback.networks import Task, logits_of, trained
from efface.feedback.page import Page
from efface.feedback.reward import RewardModel
from efface.intervals import area

NOW = "2026-01-01T00:00:00+00:00"
WHAT = "scary things"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These stores need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "labels.db")


def draw(folder: Path, *colours: int, side: int = 8) -> Path:
    """Pictures whose red part is what annotators judge."""
    folder.mkdir(exist_ok=True)
    for red in colours:
        Image.new("RGB", (side, side), (red, 0, 0)).save(folder / f"picture {red:03d}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "pool", *range(0, 240, 20))  # 12 pictures


def red(path: Path) -> int:
    return int(np.array(Image.open(path))[0, 0, 0])


def judge(session: Session, says: Callable[[Path], str]) -> None:
    for k in session.left:
        answers = [says(session.items[place].path) for place in session.shown(k)]
        session.answer(k, answers if isinstance(session, Ranking) else answers[0])


def rank_by_red(session: Ranking) -> None:
    for k in session.left:
        reds = [red(session.items[place].path) for place in session.shown(k)]
        order = sorted(reds, reverse=True)
        session.answer(k, ["x" if each < 60 else str(order.index(each) + 1) for each in reds])


# ---------------------------------------------------------------- the pool


def test_a_pool_holds_each_picture_once_by_its_content(folder: Path) -> None:
    items = pool(folder)
    assert len(items) == 12 and len({item.picture for item in items}) == 12
    (folder / "copy.png").write_bytes((folder / "picture 000.png").read_bytes())
    assert {item.picture for item in pool(folder)} == {item.picture for item in items}
    assert all(item.row.startswith("picture-") for item in items)  # file names with spaces are no ids of rows
    run = folder.parent / "run"
    (run / "images").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    draw(run / "images", 7)
    assert [red(item.path) for item in pool(run)] == [7]
    with pytest.raises(FileNotFoundError, match="is not a folder with pictures"):
        pool(folder.parent / "absent")


# ---------------------------------------------------------------- sessions


def test_binary_answers_are_stored_each_and_a_grown_pool_asks_only_for_what_is_new(store: Store, folder: Path) -> None:
    session = Session(store, pool(folder), WHAT, "ana", 1, kind="binary")
    for k in session.left[:5]:
        session.answer(k, "yes")
        assert len(store.judgements(kind="binary")) == k + 1
    with pytest.raises(ValueError, match="`outcome` to be one of 'yes', 'no'"):
        session.answer(7, "there")
    draw(folder, 250)
    again = Session(store, pool(folder), WHAT, "ana", 1, kind="binary")
    assert len(again.left) == 8 and len(Session(store, pool(folder), WHAT, "ben", 1, kind="binary").left) == 13
    judge(again, lambda path: "no")
    assert [each.outcome for each in store.judgements(annotator="ana")] == ["yes"] * 5 + ["no"] * 8
    assert store.judgements(kind="label") == []


def test_all_annotators_rank_the_same_sets_in_another_order(store: Store, folder: Path) -> None:
    sessions = [Ranking(store, pool(folder), WHAT, who, n) for who, n in (("ana", 1), ("ben", 1), ("ana", 2))]
    sets = [{frozenset(each.items[k].picture for k in group) for group in each.sets} for each in sessions]
    assert sets[0] == sets[1] != sets[2]
    assert [sorted(map(len, each)) for each in sets] == [[4, 4, 4]] * 3
    shown = [[each.items[k].picture for k in itertools.chain(*each.sets)] for each in sessions]
    assert shown[0] != shown[1]
    for n in range(2, 30):
        few = pool(draw(folder.parent / f"pool {n}", *range(n)))
        sizes = list(map(len, Ranking(store, few, WHAT, "ana", 1).sets))
        assert sum(sizes) == n and 2 <= min(sizes) <= max(sizes) <= 5
    with pytest.raises(ValueError, match="at least 2 pictures to rank, got 1"):
        Ranking(store, pool(folder)[:1], WHAT, "ana", 1)


def test_a_set_is_stored_whole_and_a_stop_in_the_middle_loses_none(store: Store, folder: Path) -> None:
    session = Ranking(store, pool(folder), WHAT, "ana", 1)
    with pytest.raises(ValueError, match="Expected 4 answers, got 3"):
        session.answer(0, ["1", "2", "x"])
    with pytest.raises(ValueError, match="`outcome` to be one of '1', '2', '3', '4', 'x'"):
        session.answer(0, ["1", "2", "5", "x"])
    assert store.judgements() == []
    session.answer(0, ["1", "2", "2", "x"])
    assert [each.outcome for each in store.judgements()] == ["1", "2", "2", "x"]
    assert len({each.details["set"] for each in store.judgements()}) == 1
    again = Ranking(store, pool(folder), WHAT, "ana", 1)
    assert again.sets == session.sets and again.left == [1, 2]
    draw(folder, 250, 251)  # now other sets, of what is left
    grown = Ranking(store, pool(folder), WHAT, "ana", 1)
    left = {grown.items[k].picture for group in grown.sets for k in group}
    assert len(left) == 10 and not left & {each.picture for each in store.judgements()}
    rank_by_red(grown)
    assert len(store.judgements()) == 14 and Ranking(store, pool(folder), WHAT, "ana", 1).left == []


def test_the_page_takes_ranks_of_the_set_that_it_shows(store: Store, folder: Path) -> None:
    with Page(Ranking(store, pool(folder), WHAT, "ana", 1)) as page:
        state = page.state()
        assert (state["kind"], state["total"], state["picture"], len(state["shown"])) == ("ranking", 3, 0, 4)
        for wrong in (["1", "2", "3"], ["1", "2", "3", "5"], ["1", "2", "3", ""], [1, 2, 3, 4], 1, None, "1234"):
            with pytest.raises(ValueError, match=r"Expected (a rank or x for each picture of the set|4 answers)"):
                page.answer({"picture": 0, "answer": wrong})
        with pytest.raises(ValueError, match="Expected a rank or x"):
            page.answer({"picture": 1, "answer": ["1", "2", "3", "4"]})
        assert store.judgements() == []
        page.answer({"picture": 0, "answer": ["1", "2", "3", "x"]})
        assert page.state()["picture"] == 1 and len(store.judgements()) == 4
        page.back()
        page.answer({"picture": 0, "answer": ["x", "x", "x", "1"]})
    assert [each.outcome for each in store.judgements()] == ["x", "x", "x", "1"]
    with Page(Session(store, pool(folder), WHAT, "ana", 1, kind="binary")) as page:
        with pytest.raises(ValueError, match="Expected an answer 1 or 2 for the picture"):
            page.answer({"picture": 0, "answer": 3})
        page.answer({"picture": 0, "answer": 2})
    assert store.judgements(kind="binary")[0].outcome == "no"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no browser")
def test_in_a_browser_a_set_is_shown_with_a_place_for_each_rank(store: Store, folder: Path, tmp_path: Path) -> None:
    with Page(Ranking(store, pool(folder), WHAT, "ana", 1)) as page:
        thread = threading.Thread(target=page.serve_forever, args=(0.02,))
        thread.start()
        profile = f"--user-data-dir={tmp_path}/profile"
        done = subprocess.run(
            [str(CHROMIUM), *FLAGS, profile, "--dump-dom", page.url],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        page.shutdown()
        thread.join()
    assert "0 of 3 sets judged" in done.stdout and done.stdout.count("<figure") == 4
    assert 'class="one now"' in done.stdout and "Store these ranks" in done.stdout
    assert "Content Security Policy" not in done.stderr


# ---------------------------------------------------------------- sheets


def fill(folder: Path, answers: Mapping[int, str]) -> None:
    path = folder / "answers.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"{n}{answers.get(int(n[:-1]), '')}" if n[:-1].isdecimal() else n for n in lines))


def test_binary_sheets_come_back_to_their_pictures(store: Store, folder: Path, tmp_path: Path) -> None:
    session = Session(store, pool(folder), WHAT, "ana", 1, kind="binary")
    write_sheets(session, tmp_path / "sheets")
    fill(tmp_path / "sheets", {k: "12"[red(session.items[k - 1].path) < 100] for k in range(1, 12)})
    facts, found = read_sheets(tmp_path / "sheets")
    assert len(found) == 11
    store.add(judgements_of(store, facts, found, NOW))
    paths = {item.picture: item.path for item in session.items}
    assert all((red(paths[each.picture]) >= 100) == (each.outcome == "yes") for each in store.judgements())
    assert len(Session(store, pool(folder), WHAT, "ana", 1, kind="binary").left) == 1
    fill(tmp_path / "sheets", {12: "3"})
    with pytest.raises(ValueError, match="the answer 1 or 2 in line"):
        read_sheets(tmp_path / "sheets")


def test_sheets_of_rankings_count_complete_sets_only(store: Store, folder: Path, tmp_path: Path) -> None:
    session = Ranking(store, pool(folder), WHAT, "ana", 1)
    (sheet,) = write_sheets(session, tmp_path / "sheets")
    assert Image.open(sheet).height == 8 + 3 * 188  # a line per set
    fill(tmp_path / "sheets", dict(zip(range(1, 8), ("1", "2", "2", "X", "3", "2", "1"), strict=True)))
    facts, found = read_sheets(tmp_path / "sheets")
    assert found == {1: "1", 2: "2", 3: "2", 4: "x"}
    store.add(judgements_of(store, facts, found, NOW))
    again = Ranking(store, pool(folder), WHAT, "ana", 1)
    assert again.left == [1, 2]
    shown = [session.items[k].picture for k in session.sets[0]]
    assert [(each.picture, each.outcome) for each in store.judgements()] == list(zip(shown, "122x", strict=True))


# ---------------------------------------------------------------- agreement


def ranked(store: Store, folder: Path, *orders: tuple[str, int]) -> None:
    for who, sign in orders:
        session = Ranking(store, pool(folder), WHAT, who, 1)
        for k in session.left:
            reds = [sign * red(session.items[place].path) for place in session.shown(k)]
            session.answer(k, [str(sorted(reds).index(each) + 1) for each in reds])


def test_rankings_are_compared_pair_by_pair(store: Store, folder: Path) -> None:
    ranked(store, folder, ("ana", 1), ("ben", 1))
    facts = agreement_facts(store.judgements())
    assert (facts["pictures"], facts["differ"], facts["alpha"], facts["annotators"]) == (18, 0, 1, ["ana", "ben"])
    assert facts["interval"][0] < 0.5  # three sets of four do not show much
    ranked(store, folder, ("cai", -1))
    reversed_ = [each for each in store.judgements() if each.annotator != "ben"]
    assert agreement_facts(reversed_)["alpha"] < -0.5 and agreement_facts(reversed_)["differ"] == 18
    assert agreement_facts(store.judgements(annotator="ana"))["alpha"] is None


# ---------------------------------------------------------------- evidence


def said(picture: int, outcome: str, who: str = "ana", kind: str = "binary", group: str = "a") -> Judgement:
    facts = ("0" * 64, "", "row", f"{picture:064x}", WHAT, who, 1, outcome, NOW, kind)
    return Judgement(*facts, details={"set": group} if kind == "ranking" else {})


def ranking(ranks: Mapping[int, str], who: str = "ana", group: str = "a") -> list[Judgement]:
    return [said(picture, rank, who, "ranking", group) for picture, rank in ranks.items()]


def numbers(evidence: Evidence) -> set[tuple[int, int]]:
    return {(int(better, 16), int(worse, 16)) for better, worse, _ in evidence.pairs}


def test_ties_are_no_pairs_and_x_loses_against_every_ranked_picture() -> None:
    found = Evidence.of(ranking({1: "1", 2: "2", 3: "2", 4: "x", 5: "x"}), WHAT)
    assert numbers(found) == {(1, 2), (1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5)}
    assert found.ties == 2 and found.shares == {} and found.contradictions == 0
    assert "One annotator judged, so the reward repeats the taste and the mistakes" in found.notes()[0]


def test_contradictory_feedback_is_counted_and_averaged() -> None:
    both = [said(1, "yes"), said(1, "no", "ben"), said(2, "yes"), said(2, "yes", "ben")]
    found = Evidence.of(both + ranking({3: "1", 4: "2"}) + ranking({3: "2", 4: "1"}, "ben"), WHAT)
    assert list(found.shares.values()) == [0.5, 1.0] and numbers(found) == {(3, 4), (4, 3)}
    assert found.contradictions == 2 and "Contradictions: 2" in found.notes()[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "Expected feedback on 'scary things', got none"),
        ([replace(said(1, "yes"), concept="scary thing")], "`concept` to be one of 'scary thing', got 'scary things'"),
        ([replace(said(1, "yes"), kind="label", outcome="there")], "got none. Judge pictures with"),
        ([said(1, "no"), said(2, "no")], "got 2 pictures and none that shows it"),
        (ranking({1: "x", 2: "x"}), "got 2 pictures and none that shows it"),
        ([said(1, "yes"), said(2, "yes")], "tells pictures apart, got equal answers for all 2"),
        (ranking({1: "1", 2: "1"}), "tells pictures apart"),
    ],
)
def test_feedback_that_teaches_nothing_is_refused(given: list[Judgement], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evidence.of(given, WHAT)


# ---------------------------------------------------------------- the reward model


def world(n: int, seed: int = 1_000_000, width: int = 16) -> tuple[list[str], Tensor, Tensor]:
    """Pictures, their embeddings, and a planted linear reward."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, width, generator=rng), dim=1)
    planted = torch.randn(width, generator=torch.Generator().manual_seed(2_000_000))
    return [f"{k:064x}" for k in range(n)], x, x @ planted


def rankings_of(names: Sequence[str], reward: Tensor, sign: int = 1, ties: bool = False) -> Evidence:
    given = []
    for start in range(0, len(names), 5):
        order = (-sign * reward[start : start + 5]).argsort().argsort()
        ranks = {start + k: str(int(rank) + 1) for k, rank in enumerate(order)}
        given += ranking(ranks, group=f"set {start}")
        if ties:
            given += ranking(dict.fromkeys(ranks, "1"), "ben", f"set {start}")
    return Evidence.of(given, WHAT)


def test_a_planted_reward_is_recovered_on_pairs_that_were_not_seen() -> None:
    names, x, reward = world(300)
    model = RewardModel.fit(rankings_of(names, reward), names, x)
    held = model.facts["ranking"]
    assert held["accuracy"] > 0.9 and held["interval"][0] > 0.85 and model.reliable and held["pairs"] == 600
    _, new, truth = world(1000, 1_000_001)
    scores = model.rewards(new)
    pairs = torch.randint(1000, (2, 4000), generator=torch.Generator().manual_seed(0))
    (a, b), clear = pairs, (truth[pairs[0]] - truth[pairs[1]]).abs() > 0.2
    assert float(((scores[a] > scores[b]) == (truth[a] > truth[b]))[clear].float().mean()) > 0.95
    swapped = RewardModel.fit(rankings_of(names, reward, -1), names, x)
    assert float(torch.corrcoef(torch.stack([scores, swapped.rewards(new)]))[0, 1]) < -0.9


def test_pictures_with_x_have_low_rewards() -> None:
    """Three quarters have an x, so their mean is near the mean of all."""
    names, x, reward = world(200)
    least, given = float(reward.quantile(0.75)), []
    for start in range(0, 200, 5):
        some = reward[start : start + 5]
        order = (-some).argsort().argsort()
        ranks = {start + k: str(int(order[k]) + 1) if some[k] > least else "x" for k in range(5)}
        given += ranking(ranks, group=f"set {start}")
    model = RewardModel.fit(Evidence.of(given, WHAT), names, x)
    held, shows = model.rewards(x, names), reward > least
    assert float(held[shows].mean()) > 0.6 and float(held[~shows].mean()) < 0.3


def test_ties_add_no_loss() -> None:
    names, x, reward = world(50)
    alone, tied = (RewardModel.fit(rankings_of(names, reward, ties=ties), names, x) for ties in (False, True))
    assert alone.facts["ties"] == 0 and tied.facts["ties"] == 100
    assert all(torch.equal(alone.tensors[name], tied.tensors[name]) for name in alone.tensors)


def votes(names: Sequence[str], yes: Sequence[bool]) -> Evidence:
    shares = {name: float(each) for name, each in zip(names, yes, strict=True)}
    return Evidence(WHAT, shares, (), {}, {}, 0, 0, ("ana", "ben"))


def test_votes_are_learned_and_chance_is_not_mistaken_for_it() -> None:
    names, x, reward = world(120)
    model = RewardModel.fit(votes(names, (reward > 0).tolist()), names, x)
    facts = model.facts["binary"]
    assert facts["auc"] > 0.9 and facts["interval"][0] > 0.8 and facts["n"] == 120 and model.reliable
    chance = random.Random(1_000_000)
    random_ = [chance.random() < 0.5 for _ in names]
    blind = RewardModel.fit(votes(names, random_), names, x)
    assert blind.facts["binary"]["interval"][0] < 0.5 < blind.facts["binary"]["interval"][1] and not blind.reliable
    seen = blind.rewards(x)  # as pictures that nobody judged: four of five networks learned them by heart
    labels = torch.tensor(random_)
    assert area(seen[labels].tolist(), seen[~labels].tolist())[0] > 0.9
    held = blind.rewards(x, names)
    assert area(held[labels].tolist(), held[~labels].tolist())[0] == pytest.approx(blind.facts["binary"]["auc"])


def test_the_network_of_a_fold_never_sees_its_pictures() -> None:
    _, x, reward = world(30)
    y, fold = (reward > 0).float(), torch.arange(30) % 3
    better, worse = torch.tensor([0, 1, 4, 2]), torch.tensor([3, 7, 5, 8])
    first = trained(x, Task(y, better, worse, fold, 3), 0)
    other = y.clone()
    other[fold == 1] = 1 - other[fold == 1]
    turned = (better != 1) & (better != 4)  # pairs 1 and 2 have a picture of fold 1
    second = trained(x, Task(other, torch.where(turned, better, worse), torch.where(turned, worse, better), fold, 3), 0)
    assert torch.equal(first["up"][1], second["up"][1]) and not torch.equal(first["up"][0], second["up"][0])
    assert torch.equal(logits_of(first, x)[1], logits_of(second, x)[1])


def test_a_reward_model_survives_its_file_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    names, x, reward = world(40)
    model = RewardModel.fit(votes(names, (reward > 0).tolist()), names, x, encoder="emoji")
    model.save(tmp_path / "reward.safetensors")
    again = RewardModel.load(tmp_path / "reward.safetensors")
    assert torch.equal(again.rewards(x, names), model.rewards(x, names)) and again.facts == files.as_json(model.facts)
    assert (again.encoder, again.concept) == ("emoji", WHAT)
    with pytest.raises(ValueError, match=r"Expected embeddings \[N, 16\], got \(3, 5\). Use the encoder 'emoji'"):
        again.rewards(torch.zeros(3, 5))
    header: dict[str, Any] = {
        "format": 1,
        "concept": WHAT,
        "encoder": "",
        "folds": dict(model.folds),
        "facts": again.facts,
    }
    for change, message in (
        ({"folds": {names[0]: 9}}, "names a fold that is missing"),
        ({"format": 2}, "expected `format` to be"),
        ({"concept": 3}, "expected `concept` to be"),
    ):
        said = {"reward": json.dumps(header | change)}
        files.write_tensors(tmp_path / "bad.safetensors", model.tensors, said)
        with pytest.raises(ValueError, match=message):
            RewardModel.load(tmp_path / "bad.safetensors")
    for name, tensor in (("out", torch.zeros(5, 3)), ("scale", torch.zeros(5)), ("shift", torch.full((5,), torch.nan))):
        files.write_tensors(
            tmp_path / "bad.safetensors", {**model.tensors, name: tensor}, {"reward": json.dumps(header)}
        )
        with pytest.raises(ValueError, match="damaged reward model, because its tensors have wrong shapes or values"):
            RewardModel.load(tmp_path / "bad.safetensors")


def test_too_few_answers_are_refused_with_their_numbers() -> None:
    names, x, _ = world(6)
    with pytest.raises(ValueError, match=r"at least 2 pictures that show 'scary things' .*got 1, 5 and 0 sets"):
        RewardModel.fit(votes(names, [True] + [False] * 5), names, x)
    with pytest.raises(ValueError, match="got none for 2 of them, such as the one with SHA-256 0000"):
        RewardModel.fit(votes(names, [True, False] * 3), names[:4], x[:4])


def test_the_interval_of_an_auc_holds_it() -> None:
    chance, hits = np.random.default_rng(1_000_000), 0
    for _ in range(200):
        value, (low, high) = area((chance.normal(size=12) + 1.5).tolist(), chance.normal(size=30).tolist())
        assert low <= value <= high
        hits += low <= 0.8556 <= high  # the normal distribution function at 1.5 / sqrt(2)
    assert hits >= 184  # 92 %: 2.5 standard deviations below 95 %
    with pytest.raises(ValueError, match="Expected scores of both kinds, got 0 and 1"):
        area([], [1.0])


# ---------------------------------------------------------------- commands


class Red:
    """An encoder that sees only how red a picture is."""

    name = "red"

    def images(self, images: Tensor) -> Tensor:
        level = images[:, 0].mean((1, 2))
        return torch.stack([level.cos(), level.sin()], 1)[None]


@pytest.mark.long
def test_feedback_becomes_a_reward_on_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_encoders, "encoder", lambda name: Red())
    draw(folder, *range(1, 240, 8))
    name = str(tmp_path / "labels.db")
    collect = ["feedback", "collect", folder, "--concept", WHAT, "--store", name]
    assert "holds no feedback yet" in call("feedback", "agreement", Store(name).name)
    call(*collect, "--annotator", "ana", "--sheets", tmp_path / "ana")
    facts = json.loads((tmp_path / "ana/sheets.json").read_text())
    shades = {item.picture: red(item.path) for item in pool(folder)}
    says = {k: "12"[shades[e["picture"]] < 120] for k, e in enumerate(facts["items"], 1)}
    fill(tmp_path / "ana", says)
    assert "42 new answers of ana in pass 1" in call("feedback", "read", tmp_path / "ana", "--store", name)
    assert "Nothing is left to judge in pass 1. --pass 2 asks again" in call(*collect, "--annotator", "ana")
    assert "the agreement is unknown, and the reward will repeat" in call("feedback", "agreement", name)
    out, figure = tmp_path / "reward.safetensors", tmp_path / "calibration.svg"
    learn = ["feedback", "reward", name, "--pictures", folder, "--concept", WHAT]
    told = call(*learn, "--out", out, "--figure", figure)
    assert (
        re.search(r"AUC (1.000|0.9\d\d) \[0.[89]\d\d, 1.000\] on 42 held-out pictures \(21 show it\)", told)
        and "One annotator judged" in told
    )
    assert figure.read_text().count("<circle") >= 1 and RewardModel.load(out).reliable
    with Store(name) as kept:
        judge(
            Session(kept, pool(folder), WHAT, "ben", 1, kind="binary"), lambda path: "yes" if red(path) > 90 else "no"
        )
    agreed = json.loads(call("feedback", "agreement", name, "--json"))["concepts"][0]
    assert agreed["passes"] == {"ana, pass 1": 42, "ben, pass 1": 42} and 0.5 < agreed["alpha"] < 1
    assert "Krippendorff's alpha: 0." in call("feedback", "agreement", name)
    assert "84 judgements" in call("feedback", "export", name, "--out", tmp_path / "all.jsonl")
    assert "84 new judgements" in call("feedback", "import", tmp_path / "other.db", tmp_path / "all.jsonl")
    assert "to be one of 'scary things', got 'scary'" in call(*learn[:-1], "scary", "--out", tmp_path / "b", code=2)
    (folder / "picture 001.png").unlink()
    assert "got none for 1 of them" in call(*learn, "--out", tmp_path / "b", code=2)


def test_pictures_are_drawn_to_be_judged_and_a_second_call_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load", lambda *_, **__: tiny.pipeline("small"))
    draw_ = ["feedback", "draw", "--prompt", "a cat", "--prompt", "a dog", "--n", "3", "--out", tmp_path / "pool"]
    assert "3 pictures in" in call(*draw_)
    items = pool(tmp_path / "pool")
    assert [item.row for item in items] == ["000000", "000001", "000002"]
    lines = [json.loads(line)["row"] for line in (tmp_path / "pool/samples.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"]) for row in lines] == [("a cat", 0), ("a dog", 1), ("a cat", 2)]
    assert "3 pictures in" in call(*draw_) and pool(tmp_path / "pool") == items
    assert "`--prompt` to be a text that is not empty" in call(*draw_, "--prompt", " ", code=2)


def test_bad_options_of_collect_are_explained(folder: Path, tmp_path: Path) -> None:
    collect = ["feedback", "collect", folder, "--store", tmp_path / "labels.db", "--sheets", tmp_path / "sheets"]
    assert "`annotator` to be" in call(*collect, "--concept", WHAT, "--annotator", "", code=2)
    assert "--concept" in call(*collect, "--concept", " ", "--annotator", "ana", code=2)
    collect[2] = tmp_path / "absent"
    assert "is not a folder with pictures" in call(*collect, "--concept", WHAT, "--annotator", "ana", code=2)


def test_a_calibration_figure_escapes_and_scales() -> None:
    bins = [{"n": 3, "predicted": p, "observed": 1.0, "interval": [0.4, 1.0]} for p in (0.1, 0.9)]
    svg = calibration_svg({"binary": {"calibration": bins}, "ranking": {"calibration": bins}})
    assert svg.startswith("<svg") and svg.count("<circle") == 4 and svg.count("predicted</text>") == 2
