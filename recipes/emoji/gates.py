"""The gates: is the autoencoder sharp enough (a), and does the model draw what the prompt says (c)?

`python gates.py a` judges autoencoder reconstructions of held-out scenes, `python gates.py c` what the finished
pipeline draws at guidance 7.5 and 25 steps from test seeds. Both eyes judge, the worse one counts. Figures go to
`results/emoji_gates.json`, contact sheets to `work/`; the exit code is 1 if a bar is missed. An interrupted `c`
continues with the kind of prompt it was at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from train_eyes import HELD, load_vae, reconstruct, unit

from efface.intervals import wilson
from efface.models.emoji.eyes import INDEX, STYLES, Eyes, Seen, load_eyes
from efface.models.emoji.weights import FOLDER, sha256

RESULTS = scenes.HERE.parents[1] / "results" / "emoji_gates.json"
GUIDANCE, STEPS, FIRST_SEED = 7.5, 25, 1_000_000
BARS_A = {"single": 0.97, "each of a pair": 0.92}
BARS_C = {"single": 0.90, "pair": 0.60, "theme": 0.75, "style": 0.90, "paraphrase": 0.50}
WITHIN = 0.05
console = Console(width=150)


def counted(hits: int, n: int) -> dict[str, Any]:
    """A rate with its 95 % Wilson interval; None where there is nothing to count."""
    if n == 0:
        return {"n": 0, "rate": None, "low": None, "high": None}
    low, high = wilson(hits, n)
    return {"n": n, "rate": round(hits / n, 4), "low": round(low, 4), "high": round(high, 4)}


def per_eye(hits: Tensor) -> list[dict[str, Any]]:
    """Rates of bool [2, N]: one per eye."""
    return [counted(int(row.sum()), len(row)) for row in hits]


def worse(eyes: list[dict[str, Any]]) -> dict[str, Any]:
    return min(eyes, key=lambda e: -1 if e["rate"] is None else e["rate"])


def rounded(hits: Tensor) -> list[float]:
    return [round(float(row.float().mean()), 4) for row in hits]


def shown(rate: dict[str, Any]) -> str:
    if rate["rate"] is None:
        return "none"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def write(gate: str, facts: dict[str, Any]) -> None:
    """Replaces the part of one gate in the results file."""
    card = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    common = {
        "date": date.today().isoformat(),
        "vocabulary": scenes.vocabulary_hash(),
        "threads": torch.get_num_threads(),
    }
    card[gate] = common | {"eyes_sha256": sha256(FOLDER / "eyes.safetensors")} | facts
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
    console.print(f"wrote {RESULTS.relative_to(scenes.HERE.parents[1])}")
    if not facts["passed"]:
        console.print(f"[red]gate {gate.upper()} is missed")
        raise SystemExit(1)
    console.print(f"[green]gate {gate.upper()} is passed")


# ---------------------------------------------------------------- gate A


def recall(named: Tensor, drawn: Sequence[scenes.Scene], rows: list[int]) -> list[dict[str, Any]]:
    """Share of the icons of some scenes that are named, from bool [2, N, 149]."""
    where = [(k, INDEX[icon]) for k in rows for icon in drawn[k].icons]
    return per_eye(named[:, [k for k, _ in where], [i for _, i in where]])


def gate_a(n: int, pipeline: Path | None) -> None:
    start = time.time()
    if pipeline is None:
        vae = load_vae()
    else:
        from efface.models.emoji import load

        vae = load(pipeline).vae
    eyes, sheets = load_eyes(), scenes.icons()
    images, drawn = scenes.batch(np.random.default_rng(HELD + 10_000), sheets, n)
    x = unit(images)
    y = torch.cat([reconstruct(vae, part) for part in x.split(256)])
    psnr = -10 * torch.log10((y - x).square().mean((1, 2, 3)))
    seen, untouched = eyes.see(y), eyes.see(x)
    named = eyes.icons(seen)
    kinds = {
        "single": [k for k, s in enumerate(drawn) if len(s.icons) == 1],
        "each of a pair": [k for k, s in enumerate(drawn) if len(s.icons) == 2],
    }
    table = Table(title=f"Gate A: {n} held-out noto scenes after the autoencoder, PSNR {psnr.mean():.2f} dB")
    for column in ("icons", "style", "eye 0", "eye 1", "worse", "bar", "worse, not reconstructed"):
        table.add_column(column)
    facts: dict[str, Any] = {"n": n, "seed": HELD + 10_000, "weights": weights_hash(vae=vae)}
    facts |= {"psnr_db": round(float(psnr.mean()), 3), "kinds": {}}
    passed = True
    for kind, rows in kinds.items():
        of_kind = {}
        for style in ("all", *STYLES):
            some = [k for k in rows if style in ("all", drawn[k].style)]
            rates = recall(named, drawn, some)
            before = worse(recall(eyes.icons(untouched), drawn, some))
            of_kind[style] = {"eyes": rates, "worse": worse(rates), "not_reconstructed": before}
            bar = BARS_A[kind] if style == "all" else None
            if bar:
                of_kind[style]["bar"] = bar
                of_kind[style]["passed"] = worse(rates)["rate"] >= bar
                passed &= of_kind[style]["passed"]
            cells = [shown(r) for r in (*rates, worse(rates))]
            table.add_row(kind, style, *cells, f"{100 * bar:.0f} %" if bar else "", shown(before))
        facts["kinds"][kind] = of_kind
    truth = torch.zeros_like(named[0])
    for k, scene in enumerate(drawn):
        truth[k, [INDEX[icon] for icon in scene.icons]] = True
    facts["wrong_icons_per_picture"] = [round(float(v), 4) for v in (named & ~truth).sum(-1).float().mean(-1)]
    style_right = eyes.styles(seen) == torch.tensor([STYLES.index(s.style) for s in drawn])
    facts["style_right"] = per_eye(style_right)
    facts["style_right_by_style"] = {
        style: worse(per_eye(style_right[:, [k for k, scene in enumerate(drawn) if scene.style == style]]))
        for style in STYLES
    }
    marks = torch.tensor([s.watermark for s in drawn])
    facts["watermark_right"] = per_eye(eyes.watermark(seen) == marks)
    facts["psnr_db_by_style"] = {
        style: round(float(psnr[[k for k, s in enumerate(drawn) if s.style == style]].mean()), 3) for style in STYLES
    }
    console.print(table)
    by_style = ", ".join(f"{style} {shown(rate)}" for style, rate in facts["style_right_by_style"].items())
    console.print(f"style right, worse eye: {by_style}")
    console.print(
        f"wrong icons per picture {facts['wrong_icons_per_picture']}, "
        f"style right {shown(worse(facts['style_right']))}, "
        f"watermark right {shown(worse(facts['watermark_right']))}, PSNR by style {facts['psnr_db_by_style']}"
    )
    missed = {}
    for eye in named:
        for k, scene in enumerate(drawn):
            for icon in scene.icons:
                missed[icon] = missed.get(icon, 0) + int(not eye[k, INDEX[icon]])
    weakest = sorted(missed.items(), key=lambda item: -item[1])[:10]
    console.print("most often missed (both eyes): " + ", ".join(f"{icon} {count}" for icon, count in weakest))
    rows = np.concatenate([p for k in range(0, 56, 14) for p in (images[k : k + 14], pixels(y[k : k + 14]))])
    scenes.sheet(rows, 14).save(scenes.WORK / "gate_a.png")
    write("a", facts | {"passed": bool(passed), "seconds": round(time.time() - start, 1)})


# ---------------------------------------------------------------- gate C


@dataclass(frozen=True)
class Prompt:
    """A prompt and what must be seen: `label` groups prompts in reports, `icons` are the wanted ones."""

    text: str
    label: str
    icons: tuple[str, ...] = ()
    style: str = ""


def cycle(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """At least `n` prompts, each of them as often as any other give or take one, and each at least once."""
    return [prompts[k % len(prompts)] for k in range(max(n, len(prompts)))]


def prompts(per: int, gender_per: int) -> dict[str, list[Prompt]]:
    """All prompts of gate C by kind; the same every time."""
    captions, themes = scenes.VOCABULARY["captions"], scenes.VOCABULARY["themes"]
    rng = np.random.default_rng(5)
    pairs = [tuple(str(i) for i in rng.choice(list(captions), 2, replace=False)) for _ in range(per)]
    order = [str(i) for i in rng.permutation(list(captions))]
    styled = []
    for k in range(per):
        icon, style = order[k % len(order)], STYLES[1 + k % (len(STYLES) - 1)]
        article = "an" if style[0] in "aeiou" else "a"
        # The two wordings change after each round of styles, so that every style is asked for both ways.
        late = k // (len(STYLES) - 1) % 2
        text = f"{article} {style} of {captions[icon]}" if late else f"{captions[icon]}, {style} style"
        styled.append(Prompt(text, style, (icon,), style))
    unseen = [Prompt(text, t, tuple(i)) for t, i in themes.items() for text in scenes.PARAPHRASES[t]["unseen"]]
    people = {job: (entry["male"], entry["female"]) for job, entry in scenes.VOCABULARY["professions"].items()}
    jobs = [Prompt(f"{'an' if job[0] in 'aeiou' else 'a'} {job}", job, icons) for job, icons in people.items()]
    return {
        "single": cycle([Prompt(text, icon, (icon,)) for icon, text in captions.items()], per),
        "pair": [Prompt(f"{captions[a]} and {captions[b]}", f"{a} + {b}", (a, b)) for a, b in pairs],
        "theme": cycle([Prompt(theme, theme, tuple(icons)) for theme, icons in themes.items()], per),
        "style": styled,
        "paraphrase": cycle(unseen, per),
        "profession": cycle(jobs, gender_per * len(jobs)),
    }


def pixels(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [0, 1] to uint8 [N, H, W, 3]."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def weights_hash(**parts: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and bytes of all weights."""
    digest = hashlib.sha256()
    for part, module in sorted(parts.items()):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def generate(
    pipe: StableDiffusionPipeline,
    kind: str,
    wanted: Sequence[Prompt],
    size: int,
    guidance: float,
    made_by: str,
    progress: Progress,
) -> tuple[np.ndarray, float]:
    """uint8 [N, 64, 64, 3], picture k from seed 1,000,000 + k, and the seconds it took; kept in `work/gate_c`."""
    texts = [p.text for p in wanted]
    key = hashlib.sha256(json.dumps([made_by, guidance, STEPS, FIRST_SEED, size, texts]).encode()).hexdigest()[:16]
    path = scenes.WORK / "gate_c" / f"{kind}-{key}.npz"
    task = progress.add_task(f"{kind}, {len(texts)} pictures", total=len(texts))
    if path.exists():
        kept = np.load(path)
        progress.update(task, completed=len(texts))
        return kept["images"], float(kept["seconds"])
    start, parts = time.time(), []
    for at in range(0, len(texts), size):
        some = texts[at : at + size]
        generators = [torch.Generator("cpu").manual_seed(FIRST_SEED + at + k) for k in range(len(some))]
        with torch.inference_mode():
            images = pipe(
                some, num_inference_steps=STEPS, guidance_scale=guidance, generator=generators, output_type="pt"
            ).images
        parts.append(pixels(images))
        progress.update(task, advance=len(some))
    images, seconds = np.concatenate(parts), time.time() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, seconds=seconds)
    return images, seconds


def count(icons: Tensor, wanted: Sequence[Prompt]) -> Tensor:
    """How many of the wanted icons are seen: [2, N], from bool [2, N, 149]."""
    return torch.stack([icons[:, k, [INDEX[i] for i in p.icons]].sum(-1) for k, p in enumerate(wanted)], 1)


def weakest(hits: Tensor, wanted: Sequence[Prompt], most: int = 10) -> dict[str, float]:
    """The labels with the lowest rates, by the worse eye."""
    labels = sorted({p.label for p in wanted})
    rows = {label: [k for k, p in enumerate(wanted) if p.label == label] for label in labels}
    rate = {label: min(rounded(hits[:, some])) for label, some in rows.items()}
    return dict(sorted(rate.items(), key=lambda item: item[1])[:most])


def judge(kind: str, eyes: Eyes, seen: Seen, wanted: Sequence[Prompt]) -> dict[str, Any]:
    """Figures of one kind of prompt. `chance` is the same rate with each picture held against the next other prompt."""
    icons, twice = eyes.icons(seen), [*wanted, *wanted]
    turned = [next(p for p in twice[k:] if p.label != wanted[k].label) for k in range(len(wanted))]
    need = {"single": 1, "pair": 2, "theme": 2, "paraphrase": 1}

    def hits_of(asked: Sequence[Prompt]) -> Tensor:
        if kind in need:
            return count(icons, asked) >= need[kind]
        likeliest, sure = eyes.styles(seen), torch.stack([eyes.style_is(seen, style) for style in STYLES], -1)
        which = torch.tensor([STYLES.index(p.style) for p in asked])
        return (likeliest == which) & sure[:, range(len(asked)), which]

    hits = hits_of(wanted)
    facts: dict[str, Any] = {"n": len(wanted), "bar": BARS_C[kind], "eyes": per_eye(hits)}
    facts["worse"] = worse(facts["eyes"])
    facts["passed"] = facts["worse"]["rate"] >= BARS_C[kind]
    facts["chance"] = rounded(hits_of(turned))
    facts["any_icon"] = rounded(icons.any(-1))
    facts["weakest"] = weakest(hits, wanted)
    if kind == "pair":
        facts["at_least_one"] = per_eye(count(icons, wanted) >= 1)
    if kind in ("theme", "paraphrase"):
        facts |= {f"at_least_{k}": per_eye(count(icons, wanted) >= k) for k in (1, 2)}
        facts |= {f"chance_at_least_{k}": rounded(count(icons, turned) >= k) for k in (1, 2)}
    if kind == "style":
        facts["icon_too"] = per_eye(count(icons, wanted) >= 1)
        facts["by_style"] = {
            style: per_eye(hits[:, [k for k, p in enumerate(wanted) if p.style == style]]) for style in STYLES[1:]
        }
    else:
        facts["plain"] = rounded(eyes.styles(seen) == STYLES.index("plain"))
    return facts


def judge_gender(eyes: Eyes, seen: Seen, wanted: Sequence[Prompt]) -> dict[str, Any]:
    """Share of men among the people seen, per profession, against the share in training."""
    gender = eyes.gender(seen)
    jobs = {}
    for job, entry in scenes.VOCABULARY["professions"].items():
        rows = gender[:, [k for k, p in enumerate(wanted) if p.label == job]]
        rates = [counted(int((row == 0).sum()), int((row >= 0).sum())) for row in rows]
        far = [1.0 if r["rate"] is None else abs(r["rate"] - entry["male_share"]) for r in rates]
        jobs[job] = {
            "trained": entry["male_share"],
            "n": rows.shape[1],
            "eyes": rates,
            "worse": rates[far.index(max(far))],
            "difference": round(max(far), 4),
            "interval_holds_trained": all(r["n"] and r["low"] <= entry["male_share"] <= r["high"] for r in rates),
            "person_seen": rounded(rows >= 0),
            "passed": max(far) <= WITHIN,
        }
    right = count(eyes.icons(seen), wanted) >= 1
    return {"jobs": jobs, "profession_right": per_eye(right), "passed": all(j["passed"] for j in jobs.values())}


def gate_c(pipeline: Path | None, per: int, gender_per: int, size: int, guidance: float) -> None:
    from efface.models.emoji import load

    start = time.time()
    eyes, pipe = load_eyes(), load(pipeline)
    pipe.set_progress_bar_config(disable=True)
    made_by = weights_hash(unet=pipe.unet, vae=pipe.vae, text_encoder=pipe.text_encoder)
    kinds, judged, seconds, unasked = {}, {}, 0.0, []
    with Progress(console=Console(stderr=True)) as progress:
        for kind, wanted in prompts(per, gender_per).items():
            images, spent = generate(pipe, kind, wanted, size, guidance, made_by, progress)
            seconds += spent
            scenes.sheet(images[:112], 14).save(scenes.WORK / f"gate_c_{kind}.png")
            lines = [f"{k // 14 + 1}.{k % 14 + 1} {json.dumps(asdict(p))}" for k, p in enumerate(wanted[:112])]
            (scenes.WORK / f"gate_c_{kind}.txt").write_text("\n".join(lines) + "\n")
            seen = eyes.see(unit(images))
            judged[kind] = len(images)
            if kind == "profession":
                gender = judge_gender(eyes, seen, wanted)
            else:
                kinds[kind] = judge(kind, eyes, seen, wanted) | {"seconds": round(spent, 1)}
            if kind in ("single", "pair", "theme"):
                unasked.append(eyes.watermark(seen))
    marks, trained = per_eye(torch.cat(unasked, 1)), scenes.WATERMARK_SHARE
    far = [abs(m["rate"] - trained) for m in marks]
    watermark = {
        "trained": trained,
        "eyes": marks,
        "worse": marks[far.index(max(far))],
        "difference": round(max(far), 4),
    }
    watermark["passed"] = max(far) <= WITHIN
    table = Table(title=f"Gate C: guidance {guidance}, {STEPS} steps, test seeds, 95 % intervals")
    for column in ("what", "n", "eye 0", "eye 1", "bar", "chance", "any icon", "passed"):
        table.add_column(column)

    def row(what: str, facts: dict[str, Any], bar: str) -> None:
        cells = [shown(rate) for rate in facts["eyes"]]
        chance, some = (
            f"{100 * pick(facts[k]):.1f} %" if k in facts else "" for k, pick in (("chance", max), ("any_icon", min))
        )
        passed = {True: "[green]yes", False: "[red]no", None: ""}[facts.get("passed")]
        table.add_row(what, str(facts["eyes"][0]["n"]), *cells, bar, chance, some, passed)

    for kind, facts in kinds.items():
        row(kind, facts, f"≥ {100 * facts['bar']:.0f} %")
        for name in ("at_least_one", "at_least_1", "at_least_2", "icon_too"):
            if name in facts:
                row(f"  {name.replace('_', ' ')}", {"eyes": facts[name]}, "")
        for style, rates in facts.get("by_style", {}).items():
            row(f"  {style}", {"eyes": rates}, "")
    row("profession right", {"eyes": gender["profession_right"]}, "")
    for job, facts in gender["jobs"].items():
        row(f"  {job}: male", facts, f"{100 * facts['trained']:.0f} ± 5 %")
    row("watermark", watermark, f"{100 * trained:.0f} ± 5 %")
    console.print(table)
    for kind, facts in kinds.items():
        weak = ", ".join(f"{label} {rate:.2f}" for label, rate in facts["weakest"].items() if rate < 1)
        console.print(f"weakest {kind}: {weak or 'none'}")
    pictures = sum(judged.values())
    facts = {
        "n": judged,
        "guidance": guidance,
        "steps": STEPS,
        "first_seed": FIRST_SEED,
        "weights": made_by,
        "kinds": kinds,
        "gender": gender,
        "watermark": watermark,
        "generation_seconds": round(seconds, 1),
        "pictures_per_second": round(pictures / seconds, 3),
        "seconds": round(time.time() - start, 1),
        "passed": all(f["passed"] for f in (*kinds.values(), gender, watermark)),
    }
    if guidance == GUIDANCE:
        write("c", facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gate", choices=("a", "c"))
    parser.add_argument(
        "--pipeline", type=Path, help="a saved pipeline; by default the packaged one (a: the trained VAE)"
    )
    parser.add_argument("--scenes", type=int, default=4096, help="held-out scenes of gate a")
    parser.add_argument("--per", type=int, default=512, help="pictures per kind of prompt in gate c")
    parser.add_argument("--gender-per", type=int, default=256, help="pictures per profession in gate c")
    parser.add_argument("--batch", type=int, default=32, help="prompts per call of the pipeline")
    parser.add_argument(
        "--guidance",
        type=float,
        default=GUIDANCE,
        help="of gate c; the bars are for 7.5, others are shown, not written",
    )
    args = parser.parse_args()
    if args.gate == "a":
        gate_a(args.scenes, args.pipeline)
    else:
        gate_c(args.pipeline, args.per, args.gender_per, args.batch, args.guidance)


if __name__ == "__main__":
    main()
