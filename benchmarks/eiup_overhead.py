"""What EIUP and the other run-time methods cost: one denoiser call with guidance, beside the plain model.

    python benchmarks/eiup_overhead.py                              # the embedded model, batch 1 and 8, all variants
    python benchmarks/eiup_overhead.py --model sd15 --batch 8 --variants "eiup projected" "eiup separate"

Variants, all with window (0, 1) and strength 1 in every cross-attention layer: `plain`, the pipeline's own call (a
negative prompt costs the same, it is the text of the unconditional rows); `eiup projected`, `separate` and `gated`, by
the public interface; `gie` (one trajectory), `safree`, `sld` and `negative, own strength` (which predict the concept in
rows of their own: half as many more); `one trajectory` and `two trajectories`, the literal baselines of literal_gie.py.
The concept is the shipped "alcohol". `projected` takes out each of its phrases on its own, so its cost grows with their
number; `projected, 1 phrase` has the first one only. The other forms join them into one text; the literal baselines
have to fit prompt and concept into one, and take as many phrases as do.

Models: `emoji`, the embedded one; `sd15` and `tiny`, the random ones of random_model.py. All in float32 on the CPU.

Variants take turns, in a new order each round; a ratio is the median over rounds of variant / plain in the same round.
Texts are encoded outside the measured time, as a pipeline does it once per picture. The first round also shows what a
variant does: each must change the conditional prediction by more than 10 %, or the script fails, because a dead hook is
cheap. On small models that round is not timed; on `sd15`, where a call takes a minute, it is. Memory is that of a fresh
process that builds the model and makes two calls (`sd15`: one): `peak`, its largest resident size, and on Linux
`calls`, the largest during the calls alone, because loading a small model takes more than calling it. The JSON file has
one record per model and batch, written as soon as it is made.

The effect is no measure of erasure, and the scene was picked for it: on `emoji` an explicit prompt and a late moment.
Of five prompts tried, each at several moments, it is the only one at which all variants pass with 8 pictures. At "a
night at the pub", the whole text moves the prediction by 6 to 12 %, and `gated` changes it by 3 to 9 %. The time of a
call does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from literal_gie import CopiedSelfAttention, OneTrajectory, TwoTrajectories
from random_model import UNETS, random_pipeline
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import efface

PROMPT = "a beer mug"
SEED, STEPS, GUIDANCE = 1_000_000, 25, 7.5
EFFECT = 0.1  # least relative change of the conditional prediction
MEMORY, HELP = 1.02, 0.3  # targets: times plain, and seconds
TIME = {"eiup": 1.05, "projected": 1.05, "gie": 1.05, "safree": 1.02, "sld": 1.5, "negative": 1.5}  # times plain

ROUNDS = {"emoji": 11, "sd15": 3, "tiny": 11}
UNTIMED = {"emoji": 1, "sd15": 0, "tiny": 1}  # rounds in front of those
CALLS = {"emoji": 2, "sd15": 1, "tiny": 2}  # of which the memory is taken
CONCEPT = efface.concept("alcohol")
WARM = {"emoji": 22, "sd15": 0, "tiny": 0}  # plain steps made before the measured call


def load(model: str) -> Any:
    return random_pipeline(UNETS[model]) if model in UNETS else efface.load(model)


# ---------------------------------------------------------------- variants

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Scene:
    """A moment in the drawing of B pictures of one prompt: latents [B, C, h, w] and the time."""

    pipe: Any
    concept: efface.Concept
    latents: Tensor
    time: Tensor

    def texts(self) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional text, each [B, L, D], asked for as in a pipeline's call."""
        pipe, prompts = self.pipe, [PROMPT] * len(self.latents)
        return pipe.encode_prompt(prompts, pipe._execution_device, 1, do_classifier_free_guidance=True)[::-1]

    def call(self, *texts: Tensor) -> Call:
        """The denoiser call that has the latents once for each text [B, L, D]."""
        text, latents = torch.cat(texts), torch.cat([self.latents] * len(texts))
        return lambda: self.pipe.unet(latents, self.time, encoder_hidden_states=text, return_dict=False)[0]


@torch.no_grad()
def scene(pipe: Any, model: str, batch: int) -> Scene:
    """The moment after `WARM[model]` of 25 plain steps."""
    config = pipe.unet.config
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    pipe.scheduler.set_timesteps(STEPS)
    for step in pipe.scheduler.timesteps[: WARM[model]]:
        now = Scene(pipe, CONCEPT, latents, step)
        uncond, cond = now.call(*now.texts())().chunk(2)
        latents = pipe.scheduler.step(uncond + GUIDANCE * (cond - uncond), step, latents).prev_sample
    return Scene(pipe, CONCEPT, latents, pipe.scheduler.timesteps[WARM[model]])


@contextmanager
def plain(scene: Scene) -> Iterator[Call]:
    yield scene.call(*scene.texts())


@contextmanager
def applied(method: Callable[..., Any], scene: Scene, phrases: int | None = None) -> Iterator[Call]:
    """A run-time method; those that guide ask the pipeline for its guidance scale, set here as a call does."""
    scene.pipe._guidance_scale = GUIDANCE
    with method(replace(scene.concept, phrases=scene.concept.phrases[:phrases])).apply(scene.pipe):
        yield scene.call(*scene.texts())


@contextmanager
def literal(kind: type[OneTrajectory], scene: Scene) -> Iterator[Call]:
    """A literal baseline on the pipeline's UNet; the processors are put back afterwards."""
    pipe, phrases = scene.pipe, list(scene.concept.phrases)

    def tokens(text: str) -> int:
        return len(pipe.tokenizer(text, add_special_tokens=False).input_ids)

    while tokens(PROMPT) + tokens(" ".join(phrases)) + 2 > pipe.tokenizer.model_max_length:
        phrases.pop()
    concept, n, m = " ".join(phrases), tokens(PROMPT), tokens(" ".join(phrases))
    cross = kind(pipe.encode_prompt(concept, pipe._execution_device, 1, False)[0], n, m)
    uncond, cond = scene.texts()
    two = isinstance(cross, TwoTrajectories)
    call = scene.call(uncond, uncond, cond, cross.insert(cond, dropped=m)) if two else scene.call(uncond, cond)
    stock = {a: a.processor for a in pipe.unet.modules() if isinstance(a, Attention)}
    try:
        for attn, processor in stock.items():
            if attn.is_cross_attention:
                attn.set_processor(cross)
            elif two:
                attn.set_processor(CopiedSelfAttention(processor))
        yield call
    finally:
        for attn, processor in stock.items():
            attn.set_processor(processor)


def eiup(normalization: Any) -> Callable[..., Any]:
    return partial(efface.EIUP, strength=1.0, window=(0.0, 1.0), normalization=normalization)


THREE_ROWS = partial(efface.NegativePrompt, strength=GUIDANCE)
VARIANTS: dict[str, Callable[[Scene], AbstractContextManager[Call]]] = {
    "plain": plain,
    "eiup projected": partial(applied, eiup("projected")),
    "projected, 1 phrase": partial(applied, eiup("projected"), phrases=1),
    "eiup separate": partial(applied, eiup("separate")),
    "eiup gated": partial(applied, eiup("gated")),
    "gie": partial(applied, efface.GIE),
    "safree": partial(applied, efface.SAFREE),
    "sld": partial(applied, efface.SLD.max),
    "sld, 1 phrase": partial(applied, efface.SLD.max, phrases=1),
    "negative, own strength": partial(applied, THREE_ROWS),
    "negative, own strength, 1 phrase": partial(applied, THREE_ROWS, phrases=1),
    "one trajectory": partial(literal, OneTrajectory),
    "two trajectories": partial(literal, TwoTrajectories),
}

# ---------------------------------------------------------------- measuring


@torch.no_grad()
def calls(
    scene: Scene, variants: Sequence[str], rounds: int, untimed: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Relative change of the conditional prediction, and the seconds of a call in each timed round, of each variant.

    RuntimeError if a variant hardly changes the prediction.
    """
    order, taken, predicted = random.Random(SEED), {name: [] for name in variants}, {}
    for number in range(untimed + rounds):
        for name in order.sample(list(variants), len(variants)):
            with VARIANTS[name](scene) as call:
                start = time.perf_counter()
                out = call()
                taken[name].append(time.perf_counter() - start)
            if number == 0:
                predicted[name] = out[-len(scene.latents) :]  # the last rows are the erased ones in every variant
        if number == 0:
            base = predicted["plain"]
            found = {name: float((out - base).norm() / base.norm()) for name, out in predicted.items()}
            for name in found.keys() - {"plain"}:
                if not found[name] > EFFECT:
                    changes = f"{name!r} changes the prediction by {found[name]:.4f}"
                    raise RuntimeError(f"{changes}, expected more than {EFFECT}.")
    return found, {name: values[untimed:] for name, values in taken.items()}


@torch.no_grad()
def resident(model: str, variant: str, batch: int) -> dict[str, int]:
    """This process's largest resident size in bytes: in all, and (Linux) in the calls once the model is built."""
    now, linux = scene(load(model), model, batch), sys.platform == "linux"

    def largest() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if linux else 1)

    with VARIANTS[variant](now) as call:
        built = largest()
        if linux:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(CALLS[model]):
            call()
    if not linux:
        return {"peak": largest()}
    calls = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return {"peak": max(built, calls), "calls": calls}


def memory(model: str, batch: int, variants: Sequence[str]) -> dict[str, dict[str, int]]:
    """`resident` of each variant in a fresh process. Call it first: a process's peak starts at that of its parent."""
    command = [sys.executable, __file__, "--model", model, "--batch", str(batch), "--one"]
    return {v: json.loads(subprocess.check_output([*command, v], text=True).splitlines()[-1]) for v in variants}


def help_seconds(runs: int = 11) -> list[float]:
    """How long `efface --help` takes, each time in a new process."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "efface", "--help"], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(model: str, batch: int, variants: Sequence[str], rounds: int, with_memory: bool) -> dict[str, Any]:
    """The record of one model and batch: see the head of this file."""
    peak = memory(model, batch, variants) if with_memory else {}
    helped, results = spread(help_seconds()), []
    effect, taken = calls(scene(load(model), model, batch), variants, rounds, UNTIMED[model])
    targets = [("efface --help, seconds", helped["median"], HELP)]
    for name in variants:
        ratio = spread([a / b for a, b in zip(taken[name], taken["plain"], strict=True)])
        row = {"variant": name, "effect": effect[name], "ratio": ratio, "seconds": spread(taken[name])}
        row["memory"] = {k: {"bytes": v, "ratio": v / peak["plain"][k]} for k, v in peak[name].items()} if peak else {}
        limit = TIME.get(name.replace(",", "").split()[0]) if batch == 8 else None
        if limit:
            targets.append((f"{name}, batch 8, time / plain", ratio["median"], limit))
        judged = limit and name.startswith(("eiup", "projected"))
        for kind, used in row["memory"].items() if judged else ():
            targets.append((f"{name}, batch 8, memory ({kind}) / plain", used["ratio"], MEMORY))
        results.append(row)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {m.__name__: m.__version__ for m in (efface, torch, diffusers)},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "prompt": PROMPT,
        "phrases": CONCEPT.phrases,
        "help_seconds": helped,
        "results": results,
        "targets": [{"what": w, "value": v, "limit": limit, "met": v <= limit} for w, v, limit in targets],
    }


def beside(new: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """The new record, and of the old one what it did not measure: variants with their ratios to the plain call then."""
    if old is None:
        return new
    measured = {row["variant"] for row in new["results"]}
    kept = [{"date": old["date"]} | row for row in old["results"] if row["variant"] not in measured]
    places = {name: k for k, name in enumerate(VARIANTS)}
    others = tuple(f"{row['variant']}, batch" for row in kept)
    return new | {
        "results": sorted(new["results"] + kept, key=lambda row: places[row["variant"]]),
        "targets": new["targets"] + [t for t in old["targets"] if t["what"].startswith(others)],
    }


def show(model: str, batch: int, record: dict[str, Any]) -> None:
    """The table, within 80 columns (memory as ratio to plain), and what became of the targets."""
    title = f"{model}, batch {batch}, {record['rounds']} rounds, {record['threads']} threads: medians (range)"
    columns = ("variant", "seconds", "x plain", "effect", "peak", "calls")
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for row in record["results"]:
        ratio, used = row["ratio"], row["memory"]
        table.add_row(
            row["variant"],
            f"{row['seconds']['median']:.3f}",
            f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})",
            f"{row['effect']:.2f}",
            *(f"{used[kind]['ratio']:.3f}" if kind in used else "" for kind in ("peak", "calls")),
        )
    console = Console()
    console.print(table)
    for t in record["targets"]:
        console.print(f"{t['what']}: {t['value']:.3f}, target {t['limit']}: {'met' if t['met'] else 'NOT met'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=ROUNDS, default="emoji")
    parser.add_argument("--rounds", type=int, help="default: 11; on sd15: 3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pictures; a call has twice as many rows")
    parser.add_argument("--variants", choices=list(VARIANTS), nargs="+", default=list(VARIANTS), help="beside `plain`")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("results/eiup_overhead.json"))
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)  # what `memory` runs
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(resident(args.model, args.one, args.batch[0])))
        return
    variants = [name for name in VARIANTS if name == "plain" or name in args.variants]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for batch in args.batch:
        record = measure(args.model, batch, variants, args.rounds or ROUNDS[args.model], args.memory)
        kept = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
        of_model = kept.setdefault(args.model, {})
        of_model[str(batch)] = record = beside(record, of_model.get(str(batch)))
        args.out.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
        show(args.model, batch, record)


if __name__ == "__main__":
    main()
