"""GIE's adapter against fixed strengths: whether it beats the one that its own ladder chose, and for which concepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import efface
from efface.erasers.gie.adapter import SHIPPED, Adapter, best_fixed
from efface.files import sha256

from .outcome import Arm, Outcome
from .runner import Plan, Unit

ROW = "gie adapter"
FACTS = ("concepts", "strengths", "losses", "best", "prompts", "held_out", "pictures", "fidelity")
JUDGED = {"residual": -1, "retention": 1}  # the sign of a better difference


def arms(plan: Plan) -> dict[str, Arm]:
    """The strengths of the ladder that trained the model's adapter, and the adapter."""
    strengths = Adapter.load(plan.model).facts["strengths"]
    fixed = {f"gie {s:g}": Arm(partial(efface.GIE, strength=s)) for s in strengths}
    return fixed | {ROW: Arm(partial(efface.GIE, adapter=plan.model))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted(Outcome):
    """Fixed strengths and the adapter, on the adapter of the model that the command names.

    The primary comparison is with the fixed strength of the least loss on the ladder, which tuning prompts and seeds
    made. If that strength is at an end of the ladder, it is not called the best, and there is no verdict.
    """

    arms: Any = arms

    def units(self, plan: Plan) -> list[Unit]:
        digest = sha256(SHIPPED[plan.model].read_bytes()) if plan.model in SHIPPED else ""
        return [
            dataclasses.replace(unit, setting=unit.setting | {"adapter": digest}) if unit.row == ROW else unit
            for unit in super().units(plan)
        ]

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        facts = Adapter.load(plan.model).facts
        return super().rows(plan, found) | {"ladder": {name: facts[name] for name in FACTS if name in facts}}

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        ladder = card["ladder"]
        try:
            best = f"gie {best_fixed(ladder.get('losses', {})):g}"
        except ValueError as error:
            found = super().derived(card)
            return found | {"verdict": [*found["verdict"], f"No verdict on the adapter. {error}"]}
        primary = tuple((ROW, best, metric) for metric in JUDGED)
        found = super(Adapted, dataclasses.replace(self, primary=primary)).derived(card)
        groups = {"All concepts": None, "Concepts of its fit": True, "Other concepts": False}
        for name, fitted in groups.items():
            cells = [k for k, c in card["cells"].items() if fitted in (None, c["concept"] in ladder["concepts"])]
            some = {row: {k: of[k] for k in cells if k in of} for row, of in card["pictures"].items()}
            compared = {metric: self._compared((ROW, best, metric), some, card["cells"]) for metric in JUDGED}
            if all(compared.values()):
                found["verdict"].append(f"{name}: {worth(best, compared)}")
        open_ended = ladder["best"][f"{max(ladder['strengths']):g}"]
        needed = sum(count for strength, count in ladder["best"].items() if strength != "0")
        found["verdict"].append(
            f"Its fit drew {ladder['pictures']:,} pictures, and each drawing takes a denoiser call more. Of {needed} "
            f"prompts that did best with a strength, {open_ended} did with the largest one."
        )
        return found


def worth(best: str, compared: Mapping[str, Any]) -> str:
    """What the adapter gains or loses against a fixed strength, and whether that is worth its fit."""
    parts, better, worse = [], [], []
    for metric, sign in JUDGED.items():
        difference, (low, high) = compared[metric]["difference"], compared[metric]["interval"]
        parts.append(f"{metric} {100 * difference:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]")
        better += [metric] if min(sign * low, sign * high) > 0 else []
        worse += [metric] if max(sign * low, sign * high) < 0 else []
    if better and worse:
        verdict = f"It pays only where {better[0]} counts more than {worse[0]}."
    elif better:
        verdict = "The adapter is worth its fit."
    elif worse:
        verdict = "The fixed strength does better, so the adapter is not worth its fit."
    else:
        verdict = "No difference is shown, so the fixed strength, which needs no fit, is enough."
    return f"the adapter against `{best}`: {', '.join(parts)}. {verdict}"
