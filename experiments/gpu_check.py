"""Times every run-time method on a GPU: `python -m experiments.gpu_check`, in at most six minutes.

Random weights at true sizes (SD 1.5, SDXL, SD 3.5 Medium, FLUX.1), built on the device without a hub. Text encoders
and VAE are small, because neither runs in a step; texts have the true number of columns. Needs torch, diffusers and
transformers alone. `--device cpu --tiny` takes the same path on the tiny pipelines of `efface.testing`.

A step is the time between two ends of steps of one pipeline call, by CUDA events on a GPU. In each round, the base
model and the methods draw once, in a new order; a ratio is that of one round. A ratio says nothing of outcomes: with
random weights there are no pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import random
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from efface import Concept, registry
from efface.families import denoiser_name, family
from efface.files import write_json
from efface.testing import tiny
from efface.testing.tiny.parts import WORDS, t5, tokenizer

COUNTS = (7, 1, 35)  # phrases; the first is measured first
PHRASES = [f"{a} {b}" for a in WORDS for b in WORDS if a != b][:: len(WORDS) * (len(WORDS) - 1) // max(COUNTS)]
PROMPT = "a night at the pub"
SHARES = {"sd15": 0.1, "sdxl": 0.25, "sd35-medium": 0.25, "flux1-dev": 0.4}  # of the time
MODES = {"eager": 0.6, "compiled": 1.0}  # the part of a model's time that has passed when it ends

# ---------------------------------------------------------------- models of true size


def clip(width: int, kind: type = CLIPTextModel) -> tuple[Any, Any]:
    """A tokenizer with CLIP's limit, and one layer of CLIP's text encoder."""
    tokens = tokenizer()
    tokens.model_max_length = 77
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": width, "max_position_embeddings": 77}
    marks = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(vocab_size=len(tokens), num_hidden_layers=1, num_attention_heads=8, **sizes, **marks)
    return tokens, kind(config)


def t5_xxl() -> tuple[Any, Any]:
    words, _ = t5(8)
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 1}
    return words, T5EncoderModel(T5Config(vocab_size=len(words), **sizes))


def vae(channels: int, **settings: float) -> AutoencoderKL:
    """One that compresses eightfold."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )


def sd15() -> Any:
    tokens, encoder = clip(768)
    return StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=encoder,
        tokenizer=tokens,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    (tokens, encoder), (tokens_2, encoder_2) = clip(768), clip(1280, CLIPTextModelWithProjection)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=encoder,
        tokenizer=tokens,
        text_encoder_2=encoder_2,
        tokenizer_2=tokens_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def sd35() -> Any:
    (tokens, encoder), (tokens_2, encoder_2) = (clip(n, CLIPTextModelWithProjection) for n in (768, 1280))
    words, encoder_3 = t5_xxl()
    transformer = SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=vae(16, shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=tokens,
        text_encoder_2=encoder_2,
        tokenizer_2=tokens_2,
        text_encoder_3=encoder_3,
        tokenizer_3=words,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> Any:
    (tokens, encoder), (words, encoder_2) = clip(768), t5_xxl()
    return FluxPipeline(
        vae=vae(16, shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=tokens,
        text_encoder_2=encoder_2,
        tokenizer_2=words,
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


TRUE: dict[str, tuple[Callable[[], Any], torch.dtype, dict[str, Any]]] = {
    "sd15": (sd15, torch.float16, {"height": 512, "width": 512}),
    "sdxl": (sdxl, torch.float16, {"height": 1024, "width": 1024}),
    "sd35-medium": (sd35, torch.bfloat16, {"height": 1024, "width": 1024, "max_sequence_length": 256}),
    "flux1-dev": (flux, torch.bfloat16, {"height": 1024, "width": 1024, "max_sequence_length": 512}),
}
TINY = {"sd15": "sd1", "sdxl": "sdxl", "sd35-medium": "sd35", "flux1-dev": "flux"}


def built(name: str, device: str, small: bool) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the options of its calls."""
    torch.manual_seed(1_000_000)
    if small:
        pipe = tiny.pipeline(TINY[name]).to(device)
        given = tiny.call_options(pipe, {}, 1)
        return pipe, {k: v for k, v in given.items() if "scale" not in k and "negative" not in k}
    make, dtype, options = TRUE[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # twelve billion weights do not fit twice
    try:
        with torch.device(device):
            pipe = make()
    finally:
        torch.set_default_dtype(before)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, options


# ---------------------------------------------------------------- measuring


@dataclass
class Clock:
    """Marks of one pipeline call: CUDA events, which do not wait, or seconds."""

    device: str
    marks: list[Any] = field(default_factory=list)

    def mark(self, *_: Any) -> dict[str, Any]:
        if self.device.startswith("cuda"):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        return {}

    def steps(self) -> list[float]:
        """Milliseconds of each step after the first, which also has the work of the call."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1000 * (b - a) for a, b in pairs]


@dataclass
class Check:
    """One model's measurements.

    Args:
        pipe: the pipeline.
        options: of its calls.
        device: it is on.
        steps: of a call.
        rounds: of each setting.
        methods: names of run-time methods.
        start, end: of its time.
    """

    pipe: Any
    options: dict[str, Any]
    device: str
    steps: int
    rounds: int
    methods: Sequence[str]
    start: float
    end: float
    until: float = 0.0  # no new round begins after it
    rows: list[dict[str, Any]] = field(default_factory=list)

    def call(self, eraser: Any, prompts: int) -> dict[str, Any]:
        """Milliseconds of a step, peak memory in bytes and the latents of one call."""
        on_gpu, clock = self.device.startswith("cuda"), Clock(self.device)
        generators = [torch.Generator(self.device).manual_seed(1_000_000 + k) for k in range(prompts)]
        call = {"generator": generators, "output_type": "latent", "callback_on_step_end": clock.mark}
        handle = None if eraser is None else eraser.apply(self.pipe)
        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            made = self.pipe([PROMPT] * prompts, num_inference_steps=self.steps, **call, **self.options).images
            peak = torch.cuda.max_memory_allocated() if on_gpu else None
        finally:
            if handle is not None:
                handle.remove()
        return {"ms": statistics.median(clock.steps()), "memory": peak, "made": made.float().cpu()}

    def variants(self, phrases: int) -> Iterator[tuple[str, Any]]:
        """Each method for this many phrases; 0: four rows with 7, 1, no and 35 phrases. EIUP and NAG come first."""
        for name in sorted(self.methods, key=lambda name: (name not in ("eiup", "nag"), name)):
            cls = registry.resolve(name)
            several = {n: Concept(f"of {n}", PHRASES[:n]) for n in COUNTS}
            rows = [[several[7]], [several[1]], [], [several[35]]]
            yield (
                name,
                (lambda cls=cls, rows=rows: cls(rows=rows))
                if not phrases
                else (lambda cls=cls, concept=several[phrases]: cls(concept)),
            )

    def setting(self, mode: str, phrases: int) -> None:
        """Rounds of the base model and every method; a method that refuses is recorded with its reason."""
        prompts, facts = (1 if phrases else 4), {"mode": mode, "phrases": phrases or "mixed rows"}
        acting: dict[str, Any] = {"base": None}
        for name, make in self.variants(phrases):
            if time.monotonic() > self.until:
                self.rows.append({**facts, "method": name, "left_out": "no time was left"})
                continue
            try:
                eraser = make()
                self.call(eraser, prompts)  # warms up and compiles
                acting[name] = eraser
            except (ValueError, TypeError, RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                self.rows.append({**facts, "method": name, "refused": f"{type(error).__name__}: {error}"[:300]})
        self.call(None, prompts)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in acting}
        for number in range(self.rounds):
            if number and time.monotonic() > self.until:
                break
            for name in random.Random(number).sample(list(acting), len(acting)):
                found[name].append(self.call(acting[name], prompts))
        for name, calls in found.items():
            base = found["base"]
            ratios = [a["ms"] / b["ms"] for a, b in zip(calls, base, strict=True)]
            away = (calls[0]["made"] - base[0]["made"]).norm() / base[0]["made"].norm()
            row = {"ms": statistics.median(c["ms"] for c in calls), "rounds": len(calls)}
            if name != "base":
                row |= {"ratio": statistics.median(ratios), "ratios": ratios, "change": float(away)}
            self.rows.append({**facts, "method": name, **row, "peak_memory": max_of(c["memory"] for c in calls)})

    def run(self, modes: Sequence[str], backend: str) -> None:
        """All settings, until the time is over: compiling a block may take longer than what is left."""
        try:
            with alarm(self.end - time.monotonic()):
                self.settings(modes, backend)
        except TimeoutError:
            self.rows.append({"mode": "any", "phrases": "any", "left_out": "stopped at the end of the time"})

    def settings(self, modes: Sequence[str], backend: str) -> None:
        for mode in modes:
            self.until = self.start + MODES[mode] * (self.end - self.start)
            if mode == "compiled" and time.monotonic() < self.until:
                self.compile(backend)
            for phrases in (*COUNTS, 0):
                if time.monotonic() < self.until:
                    self.setting(mode, phrases)
                else:
                    self.rows.append({"mode": mode, "phrases": phrases or "mixed rows", "left_out": "no time was left"})

    def compile(self, backend: str) -> None:
        """Each repeated block by itself; Efface's hooks stay outside of the graphs or leave them."""
        torch._dynamo.reset()
        torch._dynamo.config.cache_size_limit = 64
        denoiser = getattr(self.pipe, denoiser_name(self.pipe))
        kinds = ("BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
        for module in denoiser.modules():
            if type(module).__name__ in kinds:
                module.compile(backend=backend)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after some seconds, where the system has timers."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def max_of(values: Any) -> Any:
    return max((v for v in values if v is not None), default=None)


# ---------------------------------------------------------------- the card


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "a source tree"


def facts(device: str) -> dict[str, Any]:
    on_gpu = device.startswith("cuda")
    named = {name: installed(name) for name in ("efface", "torch", "diffusers", "transformers")}
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "versions": {**named, "cuda": torch.version.cuda, "python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    methods = list(registry.methods("erasers"))
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny pipelines: tries this script, measures nothing")
    parser.add_argument("--seconds", type=float, help="of all models together; default 330")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--models", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--backend", help='of torch.compile; default "inductor", with --tiny "eager"')
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the card")
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("Error: Expected a CUDA device, got none. Use `--device cpu --tiny` to try the script.", file=sys.stderr)
        return 1
    start, seconds = time.monotonic(), given.seconds or 330.0
    card: dict[str, Any] = {"gpu_check": 1, **facts(given.device), "tiny": given.tiny, "models": {}}
    total, end = sum(SHARES[name] for name in given.models), start
    for name in given.models:
        end += seconds * SHARES[name] / total  # building counts, and what a model leaves goes to the next
        pipe, options = built(name, given.device, given.tiny)
        steps, rounds = (3, 1) if given.tiny else (4, 3)
        check = Check(pipe, options, given.device, steps, rounds, given.methods, time.monotonic(), end)
        with torch.no_grad():
            check.run(given.modes, given.backend or ("eager" if given.tiny else "inductor"))
        denoiser = getattr(pipe, denoiser_name(pipe))
        card["models"][name] = {
            "family": family(pipe).name,
            "parameters": sum(weight.numel() for weight in denoiser.parameters()),
            "dtype": str(denoiser.dtype),
            "call": options | {"num_inference_steps": check.steps},
            "rows": check.rows,
        }
        for row in check.rows:
            said = f"{row['ratio']:.3f} x" if "ratio" in row else row.get("refused") or row.get("left_out") or "base"
            print(name, row["mode"], row.get("method", ""), row["phrases"], said[:100])
        del pipe, check, denoiser
        torch._dynamo.reset()
        gc.collect()
        if given.device.startswith("cuda"):
            torch.cuda.empty_cache()
    words = sys.argv[1:] if arguments is None else arguments
    card |= {"command": shlex.join(["python", "-m", "experiments.gpu_check", *words])}
    write_json(given.out, card | {"seconds": round(time.monotonic() - start, 1)})
    print(f"Card: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
