"""UCE and RECE: the closed forms are what they claim to be, and the model reads a concept as its anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CAT, WORDS, batch, change, latents
from torch import Tensor

import efface
from efface import RECE, UCE, Concept, api
from efface._text import encode
from efface._weights import keys_values
from efface.delta import Delta, Factors, dense
from efface.editors._closed_form import Texts, anchors_of, residual, step
from efface.editors.rece import derive, sum_of_products

DOG = Concept("cat", anchor="dog", keep=("moon", "a big pub"))
TAIL = 1  # where a one-word text has its last token


def rows(texts: Sequence[str]) -> Tensor:
    """[N, L, D] in float64."""
    return encode(tiny.untouched("sd1"), texts).text.double()


def originals() -> dict[str, Tensor]:
    return {n: w.detach().double() for n, w in keys_values(tiny.untouched("sd1")).items()}


def squares(weights: Sequence[Tensor]) -> Tensor:
    return sum_of_products(weights, weights)


def edited(delta: Delta) -> dict[str, Tensor]:
    return {n: w + dense(delta.weights[n]).double() for n, w in originals().items()}


def literal_uce(editor: UCE, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer by layer, with explicit inverses, as the paper writes it; `DOG`, tail tokens."""
    concept, anchor, *kept = rows(["cat", "dog", "", *DOG.keep])
    c, g, p = concept[TAIL:].T, anchor[TAIL:].T, torch.cat(kept).T
    b = editor.preserve_scale if editor.preserve_scale is not None else max(0.1, 1 / len(kept))
    ridge = editor.lam * torch.eye(len(c), dtype=torch.float64)
    return {
        n: (editor.erase_scale * w @ g @ c.T + b * w @ p @ p.T + editor.lam * w)
        @ torch.linalg.inv(editor.erase_scale * c @ c.T + b * p @ p.T + ridge)
        for n, w in weights.items()
    }


@pytest.mark.parametrize(
    "editor", [UCE(), UCE(lam=0.01), UCE(preserve_scale=0.0), UCE(erase_scale=3.0, preserve_scale=2.0)]
)
def test_the_shared_form_is_the_solution_of_every_layer(editor: UCE, sd1: Any) -> None:
    delta = editor.fit(sd1, DOG)
    want = literal_uce(editor, originals())
    assert all(change(w, want[n]) < 1e-6 for n, w in edited(delta).items())
    assert all(change(w, originals()[n]) > 0.05 for n, w in edited(delta).items())
    assert {w.rank for w in UCE(tokens="last").fit(sd1, DOG).weights.values() if isinstance(w, Factors)} == {1}
    assert all(w.numel() <= 15 * sum(w.shape) for w in delta.weights.values() if isinstance(w, Tensor))


def test_it_is_the_minimum_of_the_objective(sd1: Any) -> None:
    editor = UCE(preserve_scale=0.7)
    concept, anchor, *kept = rows(["cat", "dog", "", *DOG.keep])
    c, g, p = concept[TAIL:].T, anchor[TAIL:].T, torch.cat(kept).T
    for name, new in edited(editor.fit(sd1, DOG)).items():
        old = originals()[name]

        def objective(w: Tensor, old: Tensor = old) -> Tensor:
            return (
                (w @ c - old @ g).square().sum()
                + 0.7 * (w @ p - old @ p).square().sum()
                + 0.5 * (w - old).square().sum()
            )

        at_new, at_old = new.clone().requires_grad_(), old.clone().requires_grad_()
        for point in (at_new, at_old):
            objective(point).backward()
        assert at_new.grad is not None and at_old.grad is not None
        assert at_new.grad.norm() < 1e-5 * at_old.grad.norm()
        assert objective(new) < 0.7 * objective(old)


@pytest.mark.parametrize("editor", [UCE(), UCE(tokens="last"), UCE(tokens="all"), RECE(rounds=2)])
def test_the_edited_model_reads_c_as_the_plain_one_reads_t_c(editor: Any, pipe: Any, family: str) -> None:
    delta = editor.fit(pipe, DOG)
    weights = {n: w.detach().double() for n, w in keys_values(pipe).items()}
    stacked, moved = (
        torch.cat([x[n] for n in weights])
        for x in (weights, {n: w + dense(delta.weights[n]) for n, w in weights.items()})
    )
    transform = torch.linalg.lstsq(stacked, moved).solution  # the one T of all layers
    assert change(stacked @ transform, moved) < 1e-5
    call = batch(family)
    text = call["encoder_hidden_states"]
    with torch.no_grad():
        plain = pipe.unet(**call).sample
        want = pipe.unet(**{**call, "encoder_hidden_states": (text.double() @ transform.T).float()}).sample
        with delta.apply(pipe):
            got = pipe.unet(**call).sample
    assert change(got, want) < 1e-4 < 1e-3 < change(got, plain)


def test_the_concept_is_drawn_as_its_anchor_and_others_stay(sd1: Any) -> None:
    def drawn(word: str) -> Tensor:
        return latents(sd1, (f"{word}",) * 4)

    plain = {word: drawn(word) for word in ("cat", "dog", "moon", "wine")}
    with UCE(lam=0.01).fit(sd1, DOG).apply(sd1):
        now = {word: drawn(word) for word in plain}
    assert change(now["cat"], plain["dog"]) < 0.3 * change(plain["cat"], plain["dog"])
    assert change(now["moon"], plain["moon"]) < 0.3 * change(now["cat"], plain["cat"])
    assert change(now["wine"], plain["wine"]) < change(now["cat"], plain["cat"])


random_rows = st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(random_rows)
def test_less_ridge_erases_more_and_more_preservation_preserves_more(sizes: tuple[int, int, int]) -> None:
    n, m, seed = sizes
    random = torch.Generator().manual_seed(seed)
    concept, anchor, kept = (torch.randn(k, 16, dtype=torch.float64, generator=random) for k in (n, n, m))
    gram = kept.T @ kept
    left = [residual(*step(concept, anchor, gram, 1.0, lam), concept, anchor) for lam in (10.0, 1.0, 0.1, 1e-6)]
    assert left == sorted(left, reverse=True) and left[-1] < 1e-3 < left[0]  # n + m <= 12 < 16: both can be had
    drift = []
    for b in (0.0, 1.0, 100.0, 1e6):
        u, v = step(concept, anchor, b * gram, 1.0, 1.0)
        drift.append(float(((kept @ v.T) @ u.T).norm()))
    assert m == 0 or (drift == sorted(drift, reverse=True) and drift[-1] < 1e-3 * max(drift[0], 1e-9))


def test_modes(sd1: Any) -> None:
    moderate, erase = UCE(mode="moderate").fit(sd1, DOG), UCE().fit(sd1, replace(DOG, anchor=""))
    assert all(torch.equal(dense(moderate.weights[n]), dense(w)) for n, w in erase.weights.items())
    editor = UCE(mode="debias", attributes={"red": 0.5, "big": -0.25}, lam=1e-9, preserve=(), tokens="last")  # type: ignore[arg-type]
    delta = editor.fit(sd1, CAT)
    cat, red, big = rows(["cat", "red", "big"])[:, TAIL]
    for name, new in edited(delta).items():
        assert change(new @ cat, originals()[name] @ (cat + 0.5 * red - 0.25 * big)) < 1e-5


def test_balance_measures_corrects_and_stops(sd1: Any) -> None:
    """Shares follow the shifts with a slope, as guidance would: the loop has to find the shift."""
    editor = UCE(mode="debias", attributes=(("red", 0.0), ("big", 0.0)), tokens="last", lam=1e-9, preserve=())
    cat, red, big = rows(["cat", "red", "big"])[:, TAIL]
    name, weight = next(iter(originals().items()))

    def measure(pipe: Any) -> list[float]:
        present = keys_values(pipe)[name].detach().double() @ cat
        seen = torch.linalg.lstsq(torch.stack([weight @ red, weight @ big], 1), present - weight @ cat).solution
        share = min(max(0.9 + 0.4 * float(seen[1] - seen[0]), 0.0), 1.0)
        return [1 - share, share]

    delta = editor.balance(sd1, CAT, measure)
    shares = delta.info["shares"]
    assert shares[0] == pytest.approx([0.1, 0.9], abs=1e-4) and 1 < len(shares) < 10
    assert shares[-1] == pytest.approx([0.5, 0.5], abs=0.05)


def literal_debias(weights: dict[str, Tensor], shifts: Sequence[float]) -> dict[str, Tensor]:
    """The published code of 2023, layer by layer: two phrases, two attributes, sizes of whole blocks of tokens."""
    made = {}
    blocks = {phrase: rows([phrase, "red", "big moon"])[:, :] for phrase in ("cat", "big cat")}
    blank = rows([""])[0].T
    for name, w in weights.items():
        top, bottom = 0.5 * w, 0.5 * torch.eye(w.shape[1], dtype=torch.float64)
        for phrase, (concept, *attributes) in blocks.items():
            starts, far = (len(phrase.split()), 1, 2), 2
            cut = [x[i : len(x) - (far - i)] for x, i in zip((concept, *attributes), starts, strict=True)]
            c, value = cut[0], cut[0] @ w.T
            for s, a in zip(shifts, cut[1:], strict=True):
                out = a @ w.T
                value = value + s * (c @ w.T).norm() * out / out.norm()
            top, bottom = top + value.T @ c, bottom + c.T @ c
        made[name] = (top + 0.1 * w @ blank @ blank.T) @ torch.linalg.inv(bottom + 0.1 * blank @ blank.T)
    return made


PETS = Concept("pet", ("cat", "big cat"))


def test_debiasing_of_2023_is_the_published_one(sd1: Any) -> None:
    """Its theorem: each layer's output goes to the concept's, plus the attributes' at the concept's own size."""
    editor = UCE.debias_2023(["red", "big moon"])
    assert (editor.mode, editor.shift, editor.tokens, editor.lam, editor.erase_scale) == (
        "debias", "layer", "tail", 0.5, 1.0)  # fmt: skip
    shifted = replace(editor, attributes=(("red", 0.3), ("big moon", -0.2)))
    delta, want = shifted.fit(sd1, PETS), literal_debias(originals(), (0.3, -0.2))
    assert all(change(w, want[n]) < 1e-5 for n, w in edited(delta).items())
    assert all(change(w, originals()[n]) > 1e-2 for n, w in edited(delta).items())
    token = replace(shifted, shift="token").fit(sd1, PETS)
    assert all(change(w, edited(token)[n]) > 1e-3 for n, w in edited(delta).items())
    exact = replace(shifted, lam=1e-9, preserve=(), tokens="last").fit(sd1, CAT)
    cat, red, moon = rows(["cat", "red", "big moon"])[[0, 1, 2], [1, 1, 2]]
    for name, new in edited(exact).items():
        w = originals()[name]
        parts = [s * (w @ cat).norm() * (w @ a) / (w @ a).norm() for s, a in ((0.3, red), (-0.2, moon))]
        assert change(new @ cat, w @ cat + sum(parts)) < 1e-5
    still = editor.fit(sd1, PETS)  # shifts of 0
    assert not any(dense(w).any() for w in still.weights.values())


def test_balance_of_2023_edits_what_it_has_edited(sd1: Any) -> None:
    """Rounds compound on the weights, with a tenth of what is missing; the pipeline is left as found."""
    editor, seen = UCE.debias_2023(["red", "big moon"]), []
    planned = [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.52, 0.48]]

    def measure(pipe: Any) -> list[float]:
        seen.append({n: w.detach().double().clone() for n, w in keys_values(pipe).items()})
        return planned[len(seen) - 1]

    before = originals()
    delta = editor.balance(sd1, PETS, measure)
    assert delta.info["shares"] == planned and len(seen) == 4
    now = before
    for shares, found in zip([None, *planned], seen, strict=False):
        now = now if shares is None else literal_debias(now, [0.1 * (0.5 - share) for share in shares])
        assert all(change(found[n], w) < 1e-5 for n, w in now.items())
    assert all(change(w, now[n]) < 1e-5 for n, w in edited(delta).items())
    assert all(torch.equal(w, before[n]) for n, w in originals().items())
    assert (delta.method, delta.after, delta.fields["shift"]) == ("uce", {}, "layer")
    assert dict(delta.fields["attributes"]) == pytest.approx({"red": -0.07, "big moon": 0.07})
    with delta.apply(sd1):
        assert latents(sd1).isfinite().all()


def test_balance_says_what_does_not_fit(sd1: Any) -> None:
    editor = UCE.debias_2023(["red", "big moon"])
    with pytest.raises(ValueError, match="a share for each of 2 attributes, got 3 measured and 2 wanted"):
        editor.balance(sd1, CAT, lambda pipe: [0.3, 0.3, 0.4])
    with pytest.raises(ValueError, match="got 2 measured and 1 wanted"):
        editor.balance(sd1, CAT, lambda pipe: [0.5, 0.5], wanted=[1.0])
    with pytest.raises(ValueError, match="Expected mode 'debias' to balance, got 'erase'"):
        UCE().balance(sd1, CAT, lambda pipe: [])
    with pytest.raises(ValueError, match="`shift`"):
        UCE(shift="norm")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`attributes` to be a sequence of texts"):
        UCE.debias_2023("male, female")
    assert efface.delta.active(sd1) == []


def test_which_tokens_are_edited(sd1: Any) -> None:
    def edit(tokens: Any, text: str = "red cat", anchor: str = "dog") -> dict[str, Any]:
        return UCE(tokens=tokens).fit(sd1, Concept(text, anchor=anchor)).info

    assert [edit(t)["edited rows"] for t in ("last", "tail", "all")] == [1, 14, 16]
    assert edit("tail", "cat", "a night at the pub")["edited rows"] == 11  # the later of the two ends
    assert edit(None)["tokens"] == "tail"
    texts = Texts(sd1, ["red cat", "dog", ""])
    assert [texts.last(t) for t in ("red cat", "dog", "")] == [2, 1, 0]


def test_a_hundred_concepts_at_once(sd1: Any) -> None:
    names = [f"{a} {b}" for a in WORDS[:10] for b in WORDS[-10:] if a != b][:100]
    concepts = [Concept(name, anchor="moon of dog") for name in names]
    delta = UCE(tokens="last", lam=1e-3).fit(sd1, concepts)
    assert delta.info["edited rows"] == len(names) >= 90 and delta.info["residual"] < 0.5
    assert all(w.numel() <= 32 * 32 for w in delta.weights.values() if isinstance(w, Tensor))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: UCE().fit(p, Concept("dog", anchor=" Dog ")), "itself as anchor"),
        (lambda p: UCE(preserve=("Cat",)).fit(p, CAT), "'Cat' is both erased and preserved"),
        (lambda p: UCE().fit(p, Concept("pet", ("cat", "dog"), keep=("dog",))), "both erased and preserved"),
        (lambda p: UCE().fit(p, [CAT, DOG]), "Expected one anchor for 'cat', got '' and 'dog'"),
        (lambda p: UCE(lam=0.0), "`lam`"),
        (lambda p: UCE(erase_scale=-1.0), "`erase_scale`"),
        (lambda p: UCE(preserve_scale=-1.0), "`preserve_scale`"),
        (lambda p: UCE(tokens="first"), "`tokens`"),  # type: ignore[arg-type]
        (lambda p: UCE(mode="forget"), "`mode`"),  # type: ignore[arg-type]
        (lambda p: UCE(mode="debias"), "Expected `attributes` with mode"),
        (lambda p: RECE(mu=0.0), "`mu`"),
        (lambda p: RECE(rounds=-1), "`rounds`"),
        (lambda p: RECE(lam=float("nan")), "`lam`"),
    ],
)
def test_bad_input(make: Any, words: str, sd1: Any) -> None:
    with pytest.raises(ValueError, match=words):
        make(sd1)


def test_one_text_is_no_sequence_of_texts() -> None:
    with pytest.raises(TypeError, match="Expected `preserve` to be a sequence of texts, got 'dog'"):
        UCE(preserve="dog")  # type: ignore[arg-type]


def test_a_preserve_set_that_forbids_the_edit_is_told(sd1: Any) -> None:
    spanning = tuple(f"{a} {b}" for a in WORDS[:6] for b in WORDS[8:])
    with pytest.warns(UserWarning, match="fewer preserved texts"):
        delta = UCE(preserve=spanning, preserve_scale=1e6).fit(sd1, CAT)
    assert delta.info["residual"] > 0.9
    with pytest.warns(UserWarning, match="a smaller `lam`"):
        UCE(lam=1e6).fit(sd1, CAT)


# ---------------------------------------------------------------- RECE


def after_uce() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """UCE's T - I as factors, the concept's rows, and the edited weights."""
    left, right, _ = UCE(preserve_scale=0.1, lam=0.1).transform(tiny.untouched("sd1"), [DOG])
    return left, right, rows(["cat"])[0], {n: w + w @ left @ right for n, w in originals().items()}


def test_the_derived_embedding_is_the_minimum_over_all_layers() -> None:
    left, right, concept, now = after_uce()
    s, old = squares(list(originals().values())), originals()
    for mu in (1e-3, 0.1):
        x = derive(s, left, right, concept, mu).requires_grad_()
        start = concept.clone().requires_grad_()
        for point in (x, start):
            fit = sum((now[n] @ point.T - old[n] @ concept.T).square().sum() for n in now)
            (fit + mu * point.square().sum()).backward()
        assert x.grad is not None and start.grad is not None
        assert x.grad.norm() < 1e-9 * start.grad.norm()


def test_an_unedited_model_has_nothing_to_recover() -> None:
    left, right, concept, _ = after_uce()
    s = squares(list(originals().values()))
    gaps = [change(derive(s, 0 * left, right, concept, mu), concept) for mu in (1.0, 1e-3, 1e-9)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-6


def test_it_recovers_what_uce_erased_the_more_the_smaller_mu() -> None:
    left, right, concept, now = after_uce()
    old, s = originals(), squares(list(originals().values()))
    made = [derive(s, left, right, concept, mu) for mu in (10.0, 0.1, 1e-3, 1e-6)]

    def gap(x: Tensor) -> float:
        return sum(float((now[n] @ x.T - old[n] @ concept.T).norm()) for n in now)

    gaps, sizes = [gap(x) for x in made], [float(x.norm()) for x in made]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.01 * gap(concept)
    assert sizes == sorted(sizes)


def literal_rece(editor: RECE, now: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Sums over layers and explicit inverses; `DOG`. `now`: what UCE has edited before."""
    own, old = UCE(preserve_scale=editor.preserve_scale, lam=editor.lam), originals()
    now = literal_uce(own, originals()) if now is None else now
    concept, anchor, *kept = rows(["cat", "dog", "", *DOG.keep])
    c, g, p = concept.T, anchor.T, torch.cat(kept).T
    eye = torch.eye(len(c), dtype=torch.float64)
    for _ in range(editor.rounds):
        x = (
            torch.linalg.inv(editor.mu * eye + sum(w.T @ w for w in now.values()))
            @ sum(now[n].T @ old[n] for n in now)
            @ c
        )
        k = torch.linalg.inv(x @ x.T + editor.preserve_scale * p @ p.T + editor.lam * eye)
        now = {n: (w @ g @ x.T + editor.preserve_scale * w @ p @ p.T + editor.lam * w) @ k for n, w in now.items()}
    return now


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_shared_form_is_the_literal_one(rounds: int, sd1: Any) -> None:
    editor = RECE(rounds=rounds).resolved(sd1)
    delta, want = editor.fit(sd1, DOG), literal_rece(editor)
    assert all(change(w, want[n]) < 1e-5 for n, w in edited(delta).items())
    uce = edited(editor.front(sd1).fit(sd1, DOG))
    assert all(change(w, uce[n]) > 1e-3 for n, w in edited(delta).items())
    assert len(delta.info["rounds"]) == rounds and all(r["norm"] > 0.1 for r in delta.info["rounds"])


def test_a_round_takes_the_derived_embedding_to_the_anchor() -> None:
    left, right, concept, now = after_uce()
    x = derive(squares(list(originals().values())), left, right, concept, 1e-3)
    anchor = rows(["dog"])[0]
    more = step(x, anchor, torch.zeros(len(left), len(left), dtype=torch.float64), 1.0, 0.1)
    for w in now.values():
        moved = w + w @ more[0] @ more[1]
        assert change(moved @ x.T, w @ anchor.T) < 0.2 * change(w @ x.T, w @ anchor.T)


def test_no_rounds_are_uce_to_the_bit(sd1: Any) -> None:
    editor = RECE(rounds=0)
    one, other = editor.fit(sd1, DOG), editor.front(sd1).fit(sd1, DOG)
    assert all(torch.equal(dense(w), dense(other.weights[n])) for n, w in one.weights.items())


def test_the_blank_text_drifts_less_the_more_it_is_preserved(sd1: Any) -> None:
    blank, drift = rows([""])[0], []
    for scale in (1e-3, 0.1, 10.0):
        now = edited(RECE(rounds=1, preserve_scale=scale).fit(sd1, replace(DOG, keep=())))
        drift.append(sum(float((now[n] @ blank.T - w @ blank.T).norm()) for n, w in originals().items()))
    assert drift == sorted(drift, reverse=True) and drift[-1] < 0.5 * drift[0]


def test_a_callback_sees_every_round_and_can_stop(sd1: Any) -> None:
    seen: list[tuple[int, Delta]] = []
    delta = RECE(rounds=3).fit(sd1, DOG, on_epoch_end=lambda k, d: seen.append((k, d)) or k == 2)
    assert [k for k, _ in seen] == [0, 1, 2] and seen[-1][1].hash == delta.hash
    assert delta.hash == RECE(rounds=2).fit(sd1, DOG).hash
    assert len(delta.info["rounds"]) == 2


def test_a_penalty_that_stifles_the_rounds_is_told(sd1: Any) -> None:
    with pytest.warns(UserWarning, match="far above the mean eigenvalue"):
        delta = RECE(mu=1e6, rounds=1).fit(sd1, DOG)
    assert delta.info["rounds"][0]["norm"] < 1e-3 and delta.info["mean eigenvalue"] > 0.1


def test_presets_have_the_papers_numbers() -> None:
    made = {name: getattr(RECE, name)() for name in ("nudity", "unsafe", "style", "hard_object", "easy_object")}
    assert {name: (r.mu, r.rounds) for name, r in made.items()} == {
        "nudity": (0.1, 3),
        "unsafe": (0.1, 2),
        "style": (1e-3, 1),
        "hard_object": (1e-3, 1),
        "easy_object": (0.1, 1),
    }
    assert {(r.preserve_scale, r.lam) for r in made.values()} == {(0.1, 0.1)}


def test_what_is_not_given_suits_the_family(sd1: Any) -> None:
    paper, own = RECE().resolved(sd1), RECE().resolved(efface.load("emoji"))
    assert (paper.mu, paper.rounds, paper.lam) == (0.1, 3, 0.1) and (own.mu, own.rounds, own.lam) == (1.0, 1, 100.0)
    assert RECE(mu=0.5, rounds=0, lam=2.0).resolved(sd1) == RECE(mu=0.5, rounds=0, lam=2.0)


def test_anchors_come_from_the_concept() -> None:
    assert anchors_of([DOG]) == {"cat": "dog"}


# ---------------------------------------------------------------- RECE from a UCE file


def distance(a: Delta, b: Delta) -> float:
    return max(change(dense(w), dense(b.weights[n])) for n, w in a.weights.items())


@pytest.mark.parametrize("given", ["delta", "path", "text"])
def test_rece_goes_on_from_a_uce_file(given: str, sd1: Any, tmp_path: Any) -> None:
    """With the UCE that RECE would fit itself, it is RECE; with another, it is the rounds written out from there."""
    path, own = tmp_path / "uce.safetensors", RECE(rounds=2).resolved(sd1)
    for uce in (own.front(sd1), UCE(preserve_scale=1.0, lam=0.5)):
        first = uce.fit(sd1, DOG)
        first.save(path)
        editor = replace(own, uce={"delta": first, "path": path, "text": str(path)}[given])
        delta = editor.fit(sd1, DOG)
        assert (distance(delta, own.fit(sd1, DOG)) < 1e-4) == (uce == own.front(sd1))
        want = literal_rece(own, literal_uce(uce, originals()))
        assert all(change(w, want[n]) < 1e-4 for n, w in edited(delta).items())
        assert distance(delta, first) > 1e-2
        assert delta.fields["uce"] == first.hash and delta.after == {} and len(delta.info["rounds"]) == 2
    assert distance(replace(own, rounds=0, uce=first).fit(sd1, DOG), first) < 1e-6


def test_rece_takes_a_uce_at_its_strength(sd1: Any) -> None:
    first = UCE().fit(sd1, DOG)
    made = [RECE(rounds=1, uce=uce).fit(sd1, DOG) for uce in (replace(first, strength=0.5), 0.5 * first)]
    assert distance(*made) < 1e-5 < 1e-2 < distance(made[0], RECE(rounds=1, uce=first).fit(sd1, DOG))


def test_a_uce_of_something_else_is_refused(sd1: Any, tmp_path: Any) -> None:
    first = UCE().fit(sd1, DOG)
    for concept, words in (
        (Concept("dog", anchor="moon"), "has no 'dog', and this fit reads 'dog' as 'moon'"),
        (CAT, "reads 'cat' as 'dog', and this fit reads 'cat' as ''"),
        (Concept("pets", ("cat", "moon"), anchor="dog"), "has no 'moon', and this fit reads 'moon' as 'dog'"),
    ):
        with pytest.raises(ValueError, match=f"but it {words}") as refused:
            RECE(uce=first).fit(sd1, concept)
        assert "Give the same concepts, or fit another UCE." in str(refused.value)
    other = tiny.pipeline()
    next(iter(keys_values(other).values())).data.add_(0.1)
    with pytest.raises(ValueError, match=r"was fitted on .* but this pipeline is .* weights differ"):
        RECE(uce=first).fit(other, DOG)
    with pytest.raises(ValueError, match=r"does not identify its base model"):
        RECE(uce=replace(first, base={})).fit(sd1, DOG)
    with first.apply(sd1):
        on_top = UCE().fit(sd1, Concept("moon"))
    attributes: Any = (("red", 0.5), ("big", -0.5))
    debiased = UCE(mode="debias", attributes=attributes).fit(sd1, CAT)
    for uce in (RECE().fit(sd1, DOG), on_top, debiased, 2 * first + on_top):
        with pytest.raises(ValueError, match="Expected `uce` to be an erasure that UCE fitted on the base model"):
            RECE(uce=uce)
    more = replace(first, weights={**first.weights, "unet.conv_in.weight": torch.zeros(16, 4, 3, 3)})
    spread = Delta.fitted(UCE(), sd1, more.weights, DOG)
    with pytest.raises(ValueError, match=r"only keys and values of cross-attention.*'unet.conv_in.weight'"):
        RECE(uce=spread).fit(sd1, DOG)
    with pytest.raises(ValueError, match="`tokens` or `uce`"):
        RECE(uce=first, tokens="last")
    with pytest.raises(TypeError, match="`uce` to be a delta or its file"):
        RECE(uce=3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="There is no delta"):
        api.editor("rece", uce=str(tmp_path / "absent.safetensors"))
    assert RECE(uce=UCE(mode="moderate").fit(sd1, CAT), rounds=0).fit(sd1, CAT).method == "rece"
