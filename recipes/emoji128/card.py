"""Writes the measured tables into the model card: `python card.py`.

Reads `results/emoji128_gates.json` (from `gates.py`) and `results/emoji128_paraphrases.json` (from `paraphrases.py`),
and replaces what stands between the card's two marks.
"""

from __future__ import annotations

import json
from typing import Any

import data

CARD = data.MODEL / "MODEL_CARD.md"
BEGIN, END = "<!-- gates:begin -->", "<!-- gates:end -->"
GATES = (("unet", "`emoji-128`"), ("flux", "`emoji-flux`"))


def percent(rate: dict[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def worse(rates: list[dict[str, Any]]) -> dict[str, Any]:
    return min(rates, key=lambda rate: rate["rate"])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def yes(passed: bool) -> str:
    return "met" if passed else "**missed**"


def gates(found: dict[str, Any]) -> list[str]:
    """Autoencoder, denoisers, shares."""
    vae = found["vae"]
    rows = [["autoencoder", "PSNR, evener scenes", f"{vae['psnr']:.2f} dB", f"{vae['n']:,}", vae["device"], "27.5 dB"]]
    rows[0].append(yes(vae["psnr_passed"]))
    if own := vae.get("psnr_of_training_scenes"):
        what = ["autoencoder", "PSNR, scenes as in training", f"{own['psnr']:.2f} dB", f"{own['n']:,}", vae["device"]]
        rows.append([*what, "27.5 dB", yes(own["psnr"] >= 27.5)])
    for kind, name in GATES:
        for gate in ("single", "pair", "theme", "style"):
            if facts := found.get(kind, {}).get(gate):
                rate, bar = facts["worse"], f"{100 * facts['bar']:.0f} %"
                rows.append([name, gate, percent(rate), f"{rate['n']:,}", facts["device"], bar, yes(facts["passed"])])
    lines = table(["model", "what", "measured", "n", "machine", "bar", ""], rows)
    rows = []
    for guidance in (1, 7.5):
        facts = found["unet"][f"shares at guidance {guidance:g}"]
        mark, few = worse(facts["watermark"]["eyes"]), worse(facts["minority"])
        rows.append([f"{guidance:g}", percent(mark), percent(few)])
    lines += ["Shares of `emoji-128` (n about 1,000 each; trained shares 22 % and 34 %):", ""]
    return lines + table(["guidance", "watermark", "minority gender"], rows)


def twin(found: dict[str, Any]) -> list[str]:
    """The twin beside the base model."""
    rows = []
    for concept, cells in found["concepts"].items():
        if "twin" in cells:
            pair = [worse(cells[kind]["explicit"]["eyes"]) for kind in ("unet", "twin")]
            # Of the twin, the eye that sees more counts: the worse case of an erasure.
            pair[1] = max(cells["twin"]["explicit"]["eyes"], key=lambda rate: rate["rate"])
            device = cells["twin"]["explicit"]["device"]
            rows.append([concept, percent(pair[0]), percent(pair[1]), str(pair[1]["n"]), device])
    others = [worse(found["other icons"][kind]["single"]) for kind in ("unet", "twin")]
    rows.append(["other icons", *map(percent, others), f"{others[0]['n']:,}", found["other icons"]["twin"]["device"]])
    return table(["explicit prompts of", "`emoji-128`", "twin", "n", "machine"], rows)


def paraphrases(found: dict[str, Any]) -> list[str]:
    """How many held-out paraphrases there are."""
    rows = []
    for concept, first in found["first"].items():
        new = found["replacements"].get(concept, {})
        drawn = [
            sum(entry["rate"] >= found["least"] and not entry.get("shares") for entry in texts.values())
            for texts in (first, new)
        ]
        total = found["held_out"][concept]
        rows.append([concept, f"{drawn[0]} of {len(first)}", f"{drawn[1]} of {len(new)}", str(total)])
    return table(["concept", "first texts kept", "replacements kept", "held out"], rows)


def main() -> None:
    results = data.ROOT / "results"
    found = json.loads((results / "emoji128_gates.json").read_text("utf-8"))
    texts = json.loads((results / "emoji128_paraphrases.json").read_text("utf-8"))
    lines = [
        "Both eyes judge and the worse one counts. Rates have 95 % Wilson intervals. 20 steps; guidance 7.5",
        f"(`emoji-128`) and 4 (`emoji-flux`); seeds from 1,000,000. GPU: {found['machine']}. CPU: one core.",
        "",
        *gates(found),
        "**The twin** is the UNet trained from the same seed on data without the seven concepts. It shows what a model",
        "draws that never saw them. `emoji-128`: the worse eye. Twin: for a concept, the eye that sees more.",
        "",
        *twin(found),
        "**Held-out paraphrases**: texts that `emoji-128` draws in at least 40 % of pictures (`held_out.json`). First",
        "texts: 16 pictures each, on the GPU. Replacements: 8 pictures each from tuning seeds, on the CPU.",
        "",
        *paraphrases(texts),
    ]
    card = CARD.read_text("utf-8")
    before, rest = card.split(BEGIN)
    CARD.write_text(before + BEGIN + "\n" + "\n".join(lines).rstrip() + "\n" + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
