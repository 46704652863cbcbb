"""Prompt sets: the emoji suite is complete and in balance; files of others are read exactly, and bad ones named."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import efface
from efface import Concept, registry, runs
from efface.models import SUITES, emoji, suite_of, vocabulary_of
from efface.records import Row, alike
from efface.suites import _csv
from efface.suites.coco import Coco
from efface.suites.emoji import Emoji
from efface.suites.emoji_128 import Emoji128
from efface.suites.i2p import I2P
from efface.suites.p4d import P4D
from efface.suites.ring_a_bell import RingABell
from efface.suites.six_cd import SixCD
from efface.suites.unlearndiffatk import UnlearnDiffAtk

EXTERNAL = [name for name in registry.methods("suites") if name not in ("emoji", "emoji_128", "prompts")]


# ---------------------------------------------------------------- emoji


@pytest.mark.parametrize(
    ("suite", "name"),
    [(suite, name) for suite in (Emoji, Emoji128) for name in (*suite.categories, "cat", "doctor", "neon sign")],
)
def test_a_concept_has_320_rows_of_every_kind_in_balance(suite: type[Emoji], name: str) -> None:
    rows, words = suite().load((Concept(name),)).rows, vocabulary_of(suite.model)
    kinds = Counter(row.kind for row in rows)
    implied = {kind for kind in ("theme", "paraphrase") if words.prompts(name, kind)}
    assert len(rows) == 320 and set(kinds) == {"explicit", "dual", "clean", "benign"} | implied
    assert bool(implied) == (name in suite.categories or (suite is Emoji128 and name == "cat"))
    assert min(kinds.values()) >= 40 and kinds["dual"] == kinds["clean"]
    assert all(1_000_000 <= row.seed < 1_000_320 for row in rows)
    for k in (12, 40):  # the first rows hold every kind, so that a limited run shows something
        assert {row.kind for row in rows[:k]} == set(kinds)
    for row in rows:
        assert (row.concept == name) == (row.kind not in ("clean", "benign"))
        if row.concept:
            assert (row.prompt, row.keep) in words.prompts(name, row.kind.replace("dual", "pair"))


@pytest.mark.parametrize("suite", [Emoji, Emoji128])
@pytest.mark.parametrize("name", ["alcohol", "cat", "doctor", "neon sign"])
def test_a_clean_half_is_its_pair_without_the_concept(suite: type[Emoji], name: str) -> None:
    rows, words = {row.id: row for row in suite().load((Concept(name),)).rows}, vocabulary_of(suite.model)
    pairs = [(row, rows[f"{row.id}-clean"]) for row in rows.values() if row.kind == "dual"]
    truth, captions = words.truth(name), words.vocabulary()["captions"]
    for dual, clean in pairs:
        assert clean.seed == dual.seed and clean.keep == dual.keep and clean.cluster == dual.cluster
        assert clean.prompt == " and ".join(captions[icon] for icon in dual.keep)
        assert clean.prompt in dual.prompt and clean.prompt != dual.prompt
        if not isinstance(truth, str):
            assert not set(truth) & set(dual.keep)
    assert len(pairs) >= 40


def test_benign_rows_show_many_other_things() -> None:
    rows = [row for row in Emoji().load((Concept("alcohol"),)).rows if row.kind == "benign"]
    groups = {g for g, icons in emoji.vocabulary()["groups"].items() for row in rows if row.keep[0] in icons}
    assert len({row.keep for row in rows}) == len(rows) and len(groups) >= 8
    assert not {row.keep[0] for row in rows} & set(emoji.truth("alcohol"))


def test_rows_of_a_target_are_a_cluster_where_there_are_enough_of_them() -> None:
    rows = Emoji().load((Concept("alcohol"),)).rows
    targets = {kind: {row.cluster for row in rows if row.kind == kind} for kind in ("explicit", "theme", "paraphrase")}
    assert targets["theme"] == targets["paraphrase"] and len(targets["theme"]) == len(emoji.themes_of("alcohol"))
    assert len(targets["explicit"]) == 8
    assert {row.cluster for row in Emoji().load((Concept("cat"),)).rows if row.kind == "explicit"} == {""}


def test_rows_of_a_concept_do_not_depend_on_the_others() -> None:
    alone, both = Emoji().load((Concept("cat"),)), Emoji().load((Concept("dog"), Concept("cat")))
    assert both.rows[320:] == alone.rows and alone.data_hash != both.data_hash
    assert Emoji().load((Concept("cat"),)) == alone
    whole = Emoji().load()
    assert {row.category for row in whole.rows} == {*Emoji.categories, "benign"} and len(whole.rows) == 1920


def test_the_larger_models_have_paraphrases_that_no_training_text_holds() -> None:
    words = vocabulary_of("emoji-128")
    trained = {text for theme in words.vocabulary()["themes"].values() for text in theme["train"]}
    rows = [row for row in Emoji128().load().rows if row.kind == "paraphrase"]
    assert {row.concept for row in rows} == set(Emoji128.categories) and len({row.prompt for row in rows}) >= 50
    assert not trained & {row.prompt for row in rows} and {row.prompt for row in rows} & {
        text for texts in words.held_out().values() for text in texts
    } == {row.prompt for row in rows}


def test_a_suite_is_drawn_by_a_model_with_its_vocabulary(tmp_path: Path) -> None:
    suite = Emoji128().load((Concept("alcohol"),), limit=2)
    with pytest.raises(
        ValueError, match="Expected the suite `emoji` for a model with the vocabulary of emoji, got 'em"
    ):
        efface.run(suite, "emoji", out=tmp_path / "run")
    assert not list(tmp_path.glob("*/*.png"))
    assert all(suite_of(model) == name for name, model in SUITES.items())
    assert [suite_of(model) for model in ("emoji-flux", "other")] == ["emoji_128", "emoji"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["emoji-128", "emoji-flux"])
def test_the_larger_models_are_benched_by_their_own_prompts_and_detectors(tmp_path: Path, model: str) -> None:
    suite = dataclasses.replace(Emoji128().load((Concept("alcohol"),), limit=12), call={"num_inference_steps": 10})
    runs.rehearse(suite)
    run = efface.run(suite, model, eraser=efface.EIUP("alcohol"), out=tmp_path / "run", guidance=5.0)
    found = {each.metric: each for each in efface.score(run)}
    assert "emoji-128 at 128 pixels" in found["detection"].protocol
    if model == "emoji-128":  # the other one is undertrained
        assert found["detection.any_icon"].value > 0.5 and found["detection"].value < 0.5


def test_options_of_the_emoji_suite() -> None:
    cat = (Concept("cat"),)
    assert Emoji(first_seed=0, pictures=12).load(cat).rows[0].seed == 0
    for seed in (-1, 9_900, 10_000, 999_999, 2**32 - 10):
        with pytest.raises(ValueError, match="seeds from 1,000,000 on|`first_seed` >= 0"):
            Emoji(first_seed=seed)
    with pytest.raises(ValueError, match="number `pictures` >= 10"):
        Emoji(pictures=9)
    assert len(Emoji().load(cat, limit=7).rows) == 7
    assert Emoji().load(cat, limit=7).version.endswith(", the first 7")
    assert Emoji().load(cat, limit=320) == Emoji().load(cat)
    with pytest.raises(ValueError, match="Expected a whole number `limit` >= 1, got 0"):
        Emoji().load(cat, limit=0)
    with pytest.raises(ValueError, match="Unknown concept 'cst'.*'cat'"):
        Emoji().load((Concept("cst"),))
    fair = [row for row in Emoji(fairness=4).load(cat).rows if row.kind == "fairness"]
    assert Counter(row.category for row in fair) == dict.fromkeys(emoji.vocabulary()["professions"], 4)
    assert "deviation_ratio" in {m.name for m in Emoji(fairness=4).load(cat).metrics}


# ---------------------------------------------------------------- the reader


def write(path: Path, header: str, *rows: tuple[object, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(), *rows])
    return path


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


@given(st.lists(st.tuples(TEXT, TEXT), max_size=6))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = write(tmp_path_factory.mktemp("csv") / "x.csv", "prompt other", *rows)
    lines = _csv.read(path, ("other", "prompt"))
    assert [(line["prompt"], line["other"]) for line in lines] == rows


def test_a_line_knows_where_its_record_starts(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('prompt\n"a\ncat"\n"a dog"\n"a\n\nhat"\na bee\n')
    assert [line.number for line in _csv.read(tmp_path / "x.csv", ("prompt",))] == [2, 4, 5, 8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks the columns prompt, seed. Its header has nothing"),
        (b"prompt,sede\n", "lacks the column seed. Its header has prompt, sede"),
        (b"prompt,seed\na cat,1\na cat,1,2\n", "line 3, column 3: expected 2 fields, got 3"),
        (b"prompt,seed\na cat\n", "line 2, column 2: expected 2 fields, got 1"),
        (b'prompt,seed\n"a\ncat",1\n"a dog,2\n', "line 4: not a CSV record"),
        (b'prompt,seed\n"a" cat,1\n', "line 2: not a CSV record"),
        (b"prompt,seed\n\xff\xfe,1\n", "is not UTF-8"),
    ],
)
def test_a_malformed_file_is_named_with_line_and_column(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        _csv.read(tmp_path / "x.csv", ("prompt", "seed"))
    assert "x.csv" in str(error.value) and "cat" not in str(error.value)  # a text may be offensive


@pytest.mark.parametrize("seed", ["4294967296", "-1", "1.5", "", "nan", "abc", "99999999999999999999999"])
def test_a_seed_that_is_none_is_named(tmp_path: Path, seed: str) -> None:
    line = _csv.read(write(tmp_path / "x.csv", "prompt seed", ("a cat", "7"), ("a cat", seed)), ("seed",))[1]
    with pytest.raises(ValueError, match=r"x\.csv, line 3, column 'seed': expected a whole number from 0 to below 2"):
        line.whole("seed")


def test_values_of_a_line(tmp_path: Path) -> None:
    line = _csv.read(write(tmp_path / "x.csv", "prompt seed g", (" ", "4294967295.0", "7.5")), ("seed",))[0]
    assert line.whole("seed") == 2**32 - 1 and line.number_in("g", 0, 10) == 7.5
    with pytest.raises(ValueError, match="line 2, column 'prompt': expected a text, got an empty one"):
        line.text("prompt")
    with pytest.raises(ValueError, match=r"column 'g': expected a number in \[0, 1\], got '7.5'"):
        line.number_in("g", 0, 1)


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_limit_is_spread_over_all(n: int, limit: int) -> None:
    rows = [Row(str(k), "a cat", k) for k in range(n)]
    found = [row.seed for row in alike(rows, limit)]
    assert len(found) == min(n, limit) and found == sorted(set(found)) and found[0] == 0
    if limit <= n:
        assert max(b - a for a, b in zip(found, [*found[1:], n], strict=True)) <= -(-n // limit)


# ---------------------------------------------------------------- tiny copies of the other sets


I2P_HEADER = (
    "prompt categories nudity_percentage evaluation_seed evaluation_guidance sd_image_width sd_image_height case_number"
)


def i2p(data: Path, header: str = I2P_HEADER) -> Path:
    return write(
        data / "i2p" / "i2p.csv",
        header,
        ("a red ball", "violence, shocking", "0.0", "4290749014", "7", "512", "512", "3"),
        ('a "blue", ball', "sexual", "60.0", "5", "12.5", "448", "512", "4"),
        ("a school bus", "sexual", "0.0", "6", "7", "512", "512", "5"),
        ("a school", "violence", "0.0", "7", "7", "512", "512", "6"),
        ("", "illegal activity", "0.0", "7", "7", "512", "512", "2260"),
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Harmless files of the shape of every set."""
    i2p(tmp_path)
    seeds = [(k, k + 40, f"a cat and {k} dogs") for k in range(10)]
    six = tmp_path / "six_cd"
    for category in ("harm", "nudity"):
        write(six / f"{category}.csv", "case_number evaluation_seed prompt", *seeds)
    write(six / "benign.csv", "case_number prompt evaluation_seed", *[(k, f"<b>a hat</b>, {k}", k) for k in range(20)])
    names = {
        "celebrity": ["oprah_winfre", "jane_doe"],
        "character": ["Rocko (from a cartoon)", "Batman"],
        "object": ["tench", "church"],
        "artstyle": ["Van Gogh", "Pablo Picasso"],
    }
    for category, each in names.items():
        write(six / f"concepts_{category}.csv", "id concept", *enumerate(each))
    shown = names | {"celebrity": ["Oprah Winfrey", "Jane Doe"], "character": ["Rocko", "Batman"]}
    for category in ("harm", "nudity", *names):
        target = shown.get(category, ["x", "x"])
        cut = -1 if category == "artstyle" else None
        rows: list[tuple[object, ...]] = [
            (k, 100 + k, target[k % 2], f"a hill in the style of {target[k % 2][:cut]}") for k in range(4)
        ]
        columns = "case_number evaluation_seed target prompt"
        if category not in names:
            columns, rows = "case_number evaluation_seed prompt", [(a, b, d) for a, b, _, d in rows]
        write(six / f"dual_{category}_malicious.csv", columns, *rows)
        clean = [(k, 100 + k, "a hill") for k in (3, 2, 1, 0)]
        write(six / f"dual_{category}_clean.csv", "case_number evaluation_seed prompt", *clean)
    templates = {"artstyle": ["a hat by {artist}"], "celebrity_character_object": ["a photo of {name}", "see {name}"]}
    (six / "templates.json").write_text(json.dumps(templates))
    for name in ("nudity", "violence", "illegal", "church", "garbage_truck", "parachute", "tench", "vangogh"):
        header = "case_number prompt evaluation_seed evaluation_guidance"
        write(tmp_path / "unlearndiffatk" / f"{name}.csv", header, (0, "a hill", 1, 7), (3, "a hat", 2, 9.5))
    write(tmp_path / "coco/coco_10k.csv", "case_number source prompt evaluation_seed", (44, "c", "a cat", 1))
    write(tmp_path / "coco/coco_3k_val.csv", "case_number source prompt evaluation_seed coco_id", (1, "c", "a", 1, 55))
    bell = "prompt case_number evaluation_seed"
    write(tmp_path / "ring_a_bell/inv_violence_eta_5.5_k_77.csv", bell, ("a hat", 1, 2), ("a schoolbus", 2, 2))
    ids = "safe_model concept case_number evaluation_seed evaluation_guidance"
    p4d = [("esd", "nudity", 4, 77, 9), ("sld_max", "nudity", 3, 78, 9), ("sld_max", "all", 3, 78, 9)]
    write(tmp_path / "p4d" / "p4d_ideal_i2p_ids.csv", ids, *p4d)
    write(tmp_path / "p4d/car_esd.csv", "case_number prompt evaluation_seed evaluation_guidance", (9, "a car", 1, 7.5))
    write(tmp_path / "p4d/frenchhorn200.csv", "case_number prompt evaluation_seed evaluation_guidance", (8, "a", 1, 7))
    return tmp_path


@pytest.mark.parametrize("name", EXTERNAL)
def test_what_is_missing_says_where_it_lives(name: str, tmp_path: Path) -> None:
    suite, source = registry.resolve(name, "suites")(), importlib.import_module(f"efface.suites.{name}").SOURCE
    with pytest.raises(ValueError, match="does not ship with Efface. Give the folder") as unsaid:
        suite.load()
    with pytest.raises(FileNotFoundError, match="is missing") as missing:
        suite.load((), tmp_path)
    for error in (unsaid, missing):
        assert "https://" in str(error.value) and any(name in str(error.value) for name in ("MIT", "CC-BY"))
    assert source.files and all(len(facts.sha256) == 64 for facts in source.files.values())


@pytest.mark.parametrize("name", EXTERNAL)
def test_every_set_loads_the_same_twice_and_within_its_limit(name: str, data: Path) -> None:
    suite = registry.resolve(name, "suites")()
    once = suite.load((), data)
    assert once.rows == suite.load((), data).rows and once.licence and once.source and len(once.data_hash) == 64
    assert len(suite.load((), data, limit=1).rows) <= 2
    for path in data.rglob("*.csv"):
        path.write_text(path.read_text("utf-8").replace("hill", "mill").replace("hat", "cap").replace("ball", "bell"))
    if name != "coco":
        changed = suite.load((), data)
        assert changed.data_hash != once.data_hash


def test_i2p_rows_keep_their_seed_guidance_and_size(data: Path) -> None:
    rows = {row.id: row for row in I2P().load((), data).rows}
    assert set(rows) == {"i2p-0003", "i2p-0004", "i2p-0006"}  # one is screened, one has no prompt
    assert rows["i2p-0003"].seed == 4290749014 and rows["i2p-0003"].category == "violence"
    assert rows["i2p-0004"].prompt == 'a "blue", ball'
    assert rows["i2p-0004"].call == {"guidance": 12.5, "width": 448, "height": 512}
    assert [row.call for row in I2P(guidance=False, size=False).load((), data).rows] == [{}, {}, {}]
    ten = I2P(images=10, category="shocking").load((), data).rows
    assert [row.seed for row in ten] == [4290749014 + k for k in range(10)] and len({row.cluster for row in ten}) == 1
    assert [row.id for row in I2P(nudity=50).load((), data).rows] == ["i2p-0004"]
    assert [row.id for row in I2P().load((Concept("nudity"),), data).rows] == ["i2p-0004"]
    with pytest.raises(ValueError, match="does not measure cat. Choose from gore, harassment"):
        I2P().load((Concept("cat"),), data)
    with pytest.raises(ValueError, match="Expected `category` to be one of"):
        I2P(category="cat")
    with pytest.raises(ValueError, match="number `images` in"):
        I2P(images=0)


def test_i2p_of_the_hub_is_read_too(data: Path) -> None:
    before = I2P().load((), data).rows
    i2p(data, I2P_HEADER.replace("evaluation_seed", "sd_seed").replace("evaluation_guidance", "sd_guidance_scale"))
    assert I2P().load((), data).rows == before


def test_a_copy_that_was_screened_is_not_screened_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "i2p" / "i2p.csv"
    assert "1 dropped by the screen" in I2P().load((), data).version
    known = dataclasses.replace(
        importlib.import_module("efface.suites.i2p").SOURCE, files={"i2p.csv": _csv.Facts(5, _csv.sha256(path))}
    )
    monkeypatch.setattr("efface.suites.i2p.SOURCE", known)
    assert len(I2P().load((), data).rows) == 4


def test_a_bad_row_of_i2p_is_named(data: Path) -> None:
    path = data / "i2p" / "i2p.csv"
    good = path.read_text("utf-8")
    for old, new, message in [
        ("4290749014", "4294967296", "line 2, column 'evaluation_seed'"),
        ("a red ball", " ", "line 2, column 'prompt': expected a text"),
        ("12.5", "much", "line 3, column 'evaluation_guidance'"),
        ("sd_image_width", "width", "lacks the column sd_image_width"),
    ]:
        path.write_text(good.replace(old, new), "utf-8")
        with pytest.raises(ValueError, match=message):
            I2P().load((), data)


def test_six_cd_has_six_categories_benign_rows_and_pairs(data: Path) -> None:
    rows = SixCD().load((), data).rows
    count = Counter((row.kind, row.category) for row in rows)
    assert {category for _, category in count} == {
        *("harm", "nudity"),
        *("celebrity", "character", "object"),
        "artstyle",
        "benign",
    }
    assert count["explicit", "object"] == 2 * 2 * 5 and count["explicit", "artstyle"] == 2 * 1 * 5
    assert count["benign", "benign"] == 20 and count["natural", "harm"] == 10
    assert count["dual", "object"] == count["clean", "object"] == 4
    by_id = {row.id: row for row in rows}
    for row in rows:
        if row.kind == "dual":
            half = by_id[f"{row.id}-clean"]
            assert half.seed == row.seed and half.prompt == "a hill" and not half.concept
    assert {row.concept for row in rows if row.category == "celebrity"} == {"Oprah Winfrey", "Jane Doe", ""}
    assert {row.concept for row in rows if row.category == "character"} == {"Rocko", "Batman", ""}
    assert any("Rocko (from" in row.prompt for row in SixCD(short_names=False).load((), data).rows)
    church = SixCD(images=1).load((Concept("church"),), data).rows
    assert {row.concept for row in church} == {"church", ""} and {r.category for r in church} == {"object", "benign"}


@pytest.mark.parametrize(
    ("categories", "judge"),
    [
        (("nudity",), "nudenet3_any5_t0.5"),
        (("harm",), {"name": "q16"}),
        (("object",), {"name": "clip", "labels": ["tench", "church"], "clip": "openai/clip-vit-large-patch14"}),
        (("object", "harm"), None),
    ],
)
def test_six_cd_judges_removal_by_what_knows_the_category(categories: tuple[str, ...], judge: Any, data: Path) -> None:
    suite = SixCD(categories=categories).load((Concept("church"),) if categories == ("object",) else (), data)
    assert [m.detector for m in suite.metrics if m.name == "removal"] == [judge] * (judge is not None)
    if isinstance(judge, dict) and judge["name"] == "clip":  # every row's concept is a label
        assert {row.concept for row in suite.rows} <= {*judge["labels"], ""}


def test_truncated_names_are_completed_and_nothing_else(data: Path) -> None:
    fixed, raw = SixCD().load((), data), SixCD(fix_truncated_names=False).load((), data)
    changed = [(a.prompt, b.prompt) for a, b in zip(raw.rows, fixed.rows, strict=True) if a != b]
    assert len(changed) == 4 and {category(row.id) for row in raw.rows if row not in fixed.rows} == {"artstyle"}
    assert set(changed[:2]) == {
        ("a hill in the style of Van Gog", "a hill in the style of Van Gogh"),
        ("a hill in the style of Pablo Picass", "a hill in the style of Pablo Picasso"),
    }
    assert "names fixed" in fixed.version and "truncated" in raw.version


def category(row_id: str) -> str:
    return row_id.split("-")[1]


def test_a_limit_keeps_pairs_whole(data: Path) -> None:
    for limit in (4, 9, 30):
        rows = SixCD().load((), data, limit).rows
        ids = {row.id for row in rows}
        assert len(rows) <= limit + 1 and all(f"{row.id}-clean" in ids for row in rows if row.kind == "dual")


def test_pairs_that_do_not_match_are_named(data: Path) -> None:
    clean = data / "six_cd" / "dual_object_clean.csv"
    good = clean.read_text("utf-8")
    clean.write_text(good.replace("2,102", "2,103"))
    with pytest.raises(ValueError, match="line 4, column 'evaluation_seed': the clean half of pair 2 has another seed"):
        SixCD().load((), data)
    clean.write_text(good.replace("2,102", "7,102"))
    with pytest.raises(ValueError, match=r"column 'case_number': dual_object_clean\.csv has no clean half of pair 2"):
        SixCD().load((), data)
    clean.write_text(good)
    (data / "six_cd" / "templates.json").write_text('{"celebrity_character_object": ["a photo"]}')
    with pytest.raises(ValueError, match=r"Expected 'celebrity_character_object' in .* a list of texts with \{name\}"):
        SixCD().load((), data)


def test_the_other_sets_say_what_they_are(data: Path) -> None:
    assert [row.id for row in Coco().load((), data).rows] == ["coco-000044"]
    assert [row.id for row in Coco("3k").load((), data).rows] == ["coco-000055"]
    church = UnlearnDiffAtk(sets=("church",)).load((), data).rows
    assert [row.call for row in church] == [{"guidance": 7.0}, {"guidance": 9.5}]
    assert {row.concept for row in UnlearnDiffAtk().load((Concept("Van Gogh"),), data).rows} == {"van gogh"}
    assert {(row.kind, row.concept) for row in RingABell().load((), data).rows} == {("attack", "violence")}
    ideal = P4D().load((), data)
    assert [(row.prompt, row.seed, row.concept) for row in ideal.rows] == [('a "blue", ball', 77, "nudity")]
    assert P4D("all", "sld_max").load((), data).rows[0].concept == "violence"
    assert P4D("car").load((), data).rows[0].call == {"guidance": 7.5}
    with pytest.raises(ValueError, match="Expected `set` to be one of 'nudity', got 'all'"):
        P4D("all", "esd")
    text = (data / "p4d" / "p4d_ideal_i2p_ids.csv").read_text()
    (data / "p4d" / "p4d_ideal_i2p_ids.csv").write_text(text.replace("esd,nudity,4,", "esd,nudity,999,"))
    with pytest.raises(ValueError, match="column 'case_number': I2P in .* has no row 999"):
        P4D().load((), data)


# ---------------------------------------------------------------- the real files


@pytest.mark.skipif("EFFACE_DATA" not in os.environ, reason="EFFACE_DATA names no folder with the screened data")
@pytest.mark.parametrize("name", EXTERNAL)
def test_the_screened_copies_are_what_is_recorded(name: str) -> None:
    folder = Path(os.environ["EFFACE_DATA"])
    source = importlib.import_module(f"efface.suites.{name}").SOURCE
    for file, facts in source.files.items():
        path = source.path(folder, file)
        assert source.screened(path) and len(_csv.read(path, ())) == facts.rows
    options: dict[str, Any] = {"six_cd": {"images": 1}}.get(name, {})
    suite = registry.resolve(name, "suites")(**options).load((), folder)
    counts = {"i2p": 4451, "coco": 9991, "unlearndiffatk": 1822, "ring_a_bell": 242, "p4d": 309}
    assert len(suite.rows) == counts.get(name, 966 + 398 + 4 * 214 + 2 * 585 + 500)
    if name == "six_cd":
        raw = SixCD(images=1, fix_truncated_names=False).load((), folder)
        assert sum(a != b for a, b in zip(raw.rows, suite.rows, strict=True)) == 100
