"""What EIUP costs: one denoiser call with guidance, beside the plain model and two literal versions of the method.

    python benchmarks/eiup_overhead.py [--model emoji|sd15|tiny] [--rounds 11] [--batch 1 8] [--no-memory] [--out FILE]

Variants, all with window (0, 1) and strength 1 on every cross-attention layer:

- `plain`: the pipeline's own call, rows [uncond, cond]. (A negative prompt costs the same: it is the text of the uncond
  rows.)
- `eiup projected`, `eiup separate`, `eiup gated`: `efface.EIUP` through its public interface.
- `one trajectory`: E1 as the paper writes it, see `OneTrajectory`.
- `two trajectories`: what the published code of the second version (GIE) computes, see `TwoTrajectories`.

Models: `emoji`, the embedded one; `sd15`, a UNet of Stable Diffusion 1.5's size (64 x 64 latents, 77 text tokens) with
random weights, scaled so that attention is not uniform and the concept changes the prediction; `tiny`, a small random
one to try this script on. All run in float32 on the CPU.

Variants take turns, in a new order each round; a ratio is the median over rounds of (variant / plain in that round),
given with the smallest and the largest. Texts are encoded outside the measured time, once per round, as a pipeline does
once per picture. Peak memory is the largest resident size of a fresh process that builds the model and makes two calls.
Each variant must change the conditional prediction by more than 10 %, or the script fails: a dead hook is cheap.

The result is written to a JSON file with one entry per model; entries of other models in it are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import efface
from efface.models.emoji import SCHEDULER

PROMPT = "a night at the pub"
SEED = 1_000_000
STEPS, GUIDANCE = 25, 7.5
EFFECT = 0.1  # least relative change of the conditional prediction
TIME_TARGET, MEMORY_TARGET, HELP_TARGET = 1.05, 1.02, 0.3  # the first two times plain, the last in seconds
SELF_QUERIES = 256  # two trajectories: self-attention is copied at up to so many queries

# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """A model to measure: default rounds, what to erase, plain steps made before the measured call, its UNet if random."""

    rounds: int
    concept: efface.Concept
    warm: int = 0
    unet: dict[str, Any] | None = None


SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # the number of heads, in this UNet
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TINY = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
MODELS = {
    "emoji": Model(11, efface.concept("alcohol"), warm=12),
    "sd15": Model(3, efface.Concept("beer"), unet=SD15),
    "tiny": Model(11, efface.Concept("beer"), unet=TINY),
}


def random_pipeline(unet: dict[str, Any], tokens: int = 77) -> StableDiffusionPipeline:
    """A pipeline without a VAE around a random UNet, with a real tokenizer (letters) and a small random CLIP text model."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {token: k for k, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens)
    width = unet["cross_attention_dim"]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder, denoiser = CLIPTextModel(config).eval(), UNet2DConditionModel(**unet).eval()
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if ".attn2.to_" in name and name.endswith("weight"):
                weight *= 3
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Scene:
    """A moment in the drawing of a batch of pictures: latents [B, C, h, w] and the time. A variant makes a call of it."""

    pipe: Any
    concept: efface.Concept
    latents: Tensor
    time: Tensor

    def texts(self) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional text, each [B, L, D], as a pipeline's call asks for them."""
        positive, negative = self.pipe.encode_prompt(
            prompt=[PROMPT] * len(self.latents),
            device=self.pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return positive, negative

    def call(self, *texts: Tensor) -> Call:
        """A denoiser call with the latents once for each text [B, L, D]."""
        text, latents = torch.cat(texts), torch.cat([self.latents] * len(texts))
        return lambda: self.pipe.unet(latents, self.time, encoder_hidden_states=text, return_dict=False)[0]


@torch.no_grad()
def scene(pipe: Any, model: Model, batch: int) -> Scene:
    """The moment after `model.warm` of 25 plain steps."""
    config = pipe.unet.config
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    pipe.scheduler.set_timesteps(STEPS)
    for step in pipe.scheduler.timesteps[: model.warm]:
        now = Scene(pipe, model.concept, latents, step)
        positive, negative = now.texts()
        without, with_text = now.call(negative, positive)().chunk(2)
        noise = without + GUIDANCE * (with_text - without)
        latents = pipe.scheduler.step(noise, step, latents, return_dict=False)[0]
    return Scene(pipe, model.concept, latents, pipe.scheduler.timesteps[model.warm])


# ---------------------------------------------------------------- literal baselines


def explicit_maps(attn: Attention, query: Tensor, text: Tensor) -> Tensor:
    """diffusers' own explicit softmax of a query [B * heads, Q, d] against a text [B, L, D]: [B * heads, Q, L]."""
    return attn.get_attention_scores(query, attn.head_to_batch_dim(attn.to_k(text)))


def project_out(attn: Attention, out: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(out)))


@dataclass(frozen=True)
class OneTrajectory:
    """Literal E1 in one cross-attention layer, with rows [uncond, cond] and every attention map written out.

    `O = [A_P ... w A_E,k ... A_P,end ...] [V_P ... V_E,k ... V_P,end ...]`: two explicit softmaxes for the conditional
    rows, over all columns of the prompt P and of the concept's text E; the m columns of E's own tokens, times w, and
    their values are inserted in front of the prompt's end token; one product of maps and values. All of the prompt's
    columns are kept. Keys and values of E are computed in each call. Self-attention stays fused: the cost is that of
    the method's own layers.

    Args:
        concept: the encoded text of the concept, [1, L, D].
        n, m: tokens of the prompt and of the concept, start and end not counted.
        weight: w.
    """

    concept: Tensor
    n: int
    m: int
    weight: float = -1.0

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        end, own = self.n + 1, slice(1, self.m + 1)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        uncond, cond = encoder_hidden_states.chunk(2)
        concept = self.concept.expand(len(cond), -1, -1)
        uncond_maps, maps = explicit_maps(attn, query, encoder_hidden_states).chunk(2)
        erasure = self.weight * explicit_maps(attn, query.chunk(2)[1], concept)[..., own]
        maps = torch.cat([maps[..., :end], erasure, maps[..., end:]], -1)
        text = torch.cat([cond[:, :end], concept[:, own], cond[:, end:]], 1)
        out = maps @ attn.head_to_batch_dim(attn.to_v(text))
        uncond_out = uncond_maps @ attn.head_to_batch_dim(attn.to_v(uncond))
        return project_out(attn, torch.cat([uncond_out, out]))


@dataclass(frozen=True)
class TwoTrajectories(OneTrajectory):
    """Literal cross-attention of the published code of GIE, with rows [uncond, uncond, base, edit].

    The base rows draw the plain prompt. In the edit rows the prompt's maps are those of the base rows, the concept's
    maps come from the edit rows' own queries, and the m padding columns behind the end token make room for the concept.
    The text of the edit rows is the prompt's with the concept's tokens inserted likewise (`edited`). The edit rows'
    own maps are computed and overwritten, as prompt-to-prompt controllers do. Together with `CopiedSelfAttention` and
    twice the rows this is the whole cost inside both of its windows. Left out, in its favour: the running sums of all
    maps, the useless erasure softmax in self-attention, explicit maps in self-attention with many queries, the adapter.
    """

    def edited(self, text: Tensor) -> Tensor:
        end = self.n + 1
        concept = self.concept[:, 1 : self.m + 1].expand(len(text), -1, -1)
        return torch.cat([text[:, :end], concept, text[:, end : end + 1], text[:, end + 1 + self.m :]], 1)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        end, own = self.n + 1, slice(1, self.m + 1)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        maps = explicit_maps(attn, query, encoder_hidden_states)
        base, edit = maps.chunk(4)[2:]
        concept = self.concept.expand(len(hidden_states) // 4, -1, -1)
        erasure = self.weight * explicit_maps(attn, query.chunk(4)[3], concept)[..., own]
        edit.copy_(torch.cat([base[..., :end], erasure, base[..., end : end + 1], base[..., end + 1 + self.m :]], -1))
        return project_out(attn, maps @ attn.head_to_batch_dim(attn.to_v(encoder_hidden_states)))


@dataclass(frozen=True)
class CopiedSelfAttention:
    """Self-attention of `TwoTrajectories`: at up to 256 queries the edit rows take the base rows' maps."""

    stock: Any

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if hidden_states.shape[1] > SELF_QUERIES:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask)
        maps = explicit_maps(attn, attn.head_to_batch_dim(attn.to_q(hidden_states)), hidden_states)
        base, edit = maps.chunk(4)[2:]
        edit.copy_(base)
        return project_out(attn, maps @ attn.head_to_batch_dim(attn.to_v(hidden_states)))


# ---------------------------------------------------------------- variants


@contextmanager
def plain(scene: Scene) -> Iterator[Call]:
    positive, negative = scene.texts()
    yield scene.call(negative, positive)


@contextmanager
def eiup(normalization: Any, scene: Scene) -> Iterator[Call]:
    with efface.EIUP(scene.concept, strength=1.0, window=(0.0, 1.0), normalization=normalization).apply(scene.pipe):
        positive, negative = scene.texts()
        yield scene.call(negative, positive)


@contextmanager
def literal(kind: type[OneTrajectory], scene: Scene) -> Iterator[Call]:
    """A literal baseline on the pipeline's UNet; its processors are put back afterwards."""
    pipe, erasure = scene.pipe, " ".join(scene.concept.phrases)
    n, m = (len(pipe.tokenizer(text, add_special_tokens=False).input_ids) for text in (PROMPT, erasure))
    if n + m + 2 > pipe.tokenizer.model_max_length:
        raise ValueError(f"Prompt and concept have {n} + {m} tokens: too many for one text of this model.")
    concept, _ = pipe.encode_prompt(erasure, pipe._execution_device, 1, False)
    positive, negative = scene.texts()
    cross = kind(concept, n, m)
    call = scene.call(negative, positive)
    if isinstance(cross, TwoTrajectories):
        call = scene.call(negative, negative, positive, cross.edited(positive))
    stock = {a: a.processor for a in pipe.unet.modules() if isinstance(a, Attention)}
    try:
        for attn, processor in stock.items():
            if attn.is_cross_attention:
                attn.set_processor(cross)
            elif isinstance(cross, TwoTrajectories):
                attn.set_processor(CopiedSelfAttention(processor))
        yield call
    finally:
        for attn, processor in stock.items():
            attn.set_processor(processor)


VARIANTS: dict[str, Callable[[Scene], AbstractContextManager[Call]]] = {
    "plain": plain,
    "eiup projected": partial(eiup, "projected"),
    "eiup separate": partial(eiup, "separate"),
    "eiup gated": partial(eiup, "gated"),
    "one trajectory": partial(literal, OneTrajectory),
    "two trajectories": partial(literal, TwoTrajectories),
}


# ---------------------------------------------------------------- measuring


def load(name: str) -> Any:
    unet = MODELS[name].unet
    return efface.load(name) if unet is None else random_pipeline(unet)


@torch.no_grad()
def effects(scene: Scene) -> dict[str, float]:
    """Relative change of the conditional prediction by each variant; RuntimeError if one hardly changes it."""
    predicted = {}
    for name, variant in VARIANTS.items():
        with variant(scene) as call:
            predicted[name] = call()[-len(scene.latents) :]  # the edited rows are the last ones in every variant
    base = predicted.pop("plain")
    found = {name: float((out - base).norm() / base.norm()) for name, out in predicted.items()}
    for name, effect in found.items():
        if not effect > EFFECT:
            raise RuntimeError(f"{name} changes the conditional prediction by {effect:.4f} only, expected > {EFFECT}.")
    return {"plain": 0.0, **found}


@torch.no_grad()
def seconds(scene: Scene, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each variant, one per round; the variants take turns, in a new order each round."""
    order, found = random.Random(SEED), {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in order.sample(list(VARIANTS), len(VARIANTS)):
            with VARIANTS[name](scene) as call:
                start = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - start)
    return found


def resident() -> int:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def one(model: str, variant: str, batch: int) -> dict[str, int]:
    """Builds the model and makes two calls: the peak before them and after."""
    now = scene(load(model), MODELS[model], batch)
    built = resident()
    with VARIANTS[variant](now) as call:
        call()
        call()
    return {"built": built, "peak": resident()}


def memory(model: str, batch: int) -> dict[str, dict[str, int]]:
    """`one` of each variant in a fresh process. To be called early: a child inherits its parent's peak."""
    command = [sys.executable, __file__, "--model", model, "--batch", str(batch), "--one"]
    return {v: json.loads(subprocess.check_output([*command, v], text=True).splitlines()[-1]) for v in VARIANTS}


def help_seconds(runs: int = 11) -> list[float]:
    """How long `efface --help` takes, each time in a new process."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "efface.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(model: str, batches: list[int], rounds: int, with_memory: bool) -> dict[str, Any]:
    peaks = {batch: memory(model, batch) if with_memory else {} for batch in batches}
    helped = spread(help_seconds())
    pipe, results = load(model), []
    for batch in batches:
        now = scene(pipe, MODELS[model], batch)
        effect, taken, peak = effects(now), seconds(now, rounds), peaks[batch]
        for name in VARIANTS:
            ratios = [a / b for a, b in zip(taken[name], taken["plain"], strict=True)]
            row = {"variant": name, "batch": batch, "seconds": spread(taken[name]), "ratio": spread(ratios)}
            row["effect"] = effect[name]
            if peak:
                row["memory"] = {**peak[name], "ratio": peak[name]["peak"] / peak["plain"]["peak"]}
            results.append(row)
    targets = [("efface --help, seconds", HELP_TARGET, helped["median"])]
    for row in results:
        if row["variant"].startswith("eiup") and row["batch"] == 8:
            targets.append((f"{row['variant']}, batch 8, time / plain", TIME_TARGET, row["ratio"]["median"]))
            if peaks[8]:
                targets.append((f"{row['variant']}, batch 8, memory / plain", MEMORY_TARGET, row["memory"]["ratio"]))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"efface": efface.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "help_seconds": helped,
        "results": results,
        "targets": [{"what": w, "limit": limit, "value": v, "met": v <= limit} for w, limit, v in targets],
    }


# ---------------------------------------------------------------- reporting


def show(model: str, record: dict[str, Any], console: Console) -> None:
    def text(value: dict[str, float], digits: int) -> str:
        return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} - {value['max']:.{digits}f})"

    title = f"{model}, {record['rounds']} rounds, {record['threads']} threads: median (range)"
    table = Table("variant", "batch", "seconds", "x plain", "effect", "peak MiB", "x plain", title=title)
    for row in record["results"]:
        used = row.get("memory")
        peak = [f"{used['peak'] / 2**20:.0f}", f"{used['ratio']:.3f}"] if used else ["", ""]
        cells = [text(row["seconds"], 3), text(row["ratio"], 3), f"{row['effect']:.2f}", *peak]
        table.add_row(row["variant"], str(row["batch"]), *cells, end_section=row["variant"] == list(VARIANTS)[-1])
    console.print(table)
    for target in record["targets"]:
        verdict = "met" if target["met"] else "NOT met"
        console.print(f"{target['what']}: {target['value']:.3f}, target <= {target['limit']}: {verdict}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--rounds", type=int, help="default: 11; on sd15: 3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pictures; a call has twice as many rows")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("results/eiup_overhead.json"))
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)  # what `memory` runs
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(one(args.model, args.one, args.batch[0])))
        return
    record = measure(args.model, args.batch, args.rounds or MODELS[args.model].rounds, args.memory)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
    args.out.write_text(json.dumps({**kept, args.model: record}, indent=2) + "\n", "utf-8")
    show(args.model, record, Console())
    print(args.out)


if __name__ == "__main__":
    main()
