"""What the guard itself costs: the time of Efface's hooks in one denoiser call, without any method's arithmetic.

    python benchmarks/guard_overhead.py                 # a random UNet of Stable Diffusion 1.5's size, on the CPU
    python benchmarks/guard_overhead.py --model emoji --device cuda

Two times are taken. A *step* is the denoiser's call with two rows, as with guidance, without erasers. The *guard* is
the same call with an eraser that changes nothing in all cross-attention layers, where every module below the hooks is
replaced by one that returns at once; the time of these calls without hooks is taken off. The guard reads the rows,
compares the text, makes the plan, follows each layer and keeps the record. Median of the rounds; the target is 0.5 % of
a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_model import UNETS, random_pipeline

import efface
from efface import EIUP
from efface.hooks import CrossAttention, ErasurePrompts
from efface.hooks.sites import site

TARGET = 0.005
OUT = Path(__file__).parents[1] / "results/guard_overhead.json"


class Nothing(EIUP):
    """An eraser that is asked in every layer and changes nothing."""

    def edit(self, out: torch.Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> torch.Tensor:
        return out


def median(call: Callable[[], Any], rounds: int, device: str) -> float:
    times = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", choices=[*UNETS, "emoji"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=5, help="denoiser calls for the time of a step")
    parser.add_argument("--rounds", type=int, default=200, help="guarded calls")
    given = parser.parse_args()
    pipe = random_pipeline(UNETS[given.model]) if given.model in UNETS else efface.load(given.model)
    pipe.to(given.device)
    unet, size = pipe.unet, pipe.unet.config.sample_size
    handle = Nothing("alcohol").apply(pipe)
    text, empty = pipe.encode_prompt("a beer mug", given.device, 1, True)
    rows = torch.cat([empty, text])
    latents = torch.randn(2, unet.config.in_channels, size, size).to(given.device, text.dtype)
    call = {"sample": latents, "timestep": 500, "encoder_hidden_states": rows, "return_dict": False}
    here = site(pipe)
    with torch.no_grad():
        unet(**call)
        record = handle.record
        handle.remove()
        step = median(lambda: unet(**call), given.steps, given.device)
        handle = Nothing("alcohol").apply(pipe)
        pipe.encode_prompt("a beer mug", given.device, 1, True)
        here = site(pipe)
        hidden = torch.zeros(2, 1, 8, device=given.device, dtype=text.dtype)
        inner = [module for layer in here.layers.cross for module in (layer.attn.to_q, layer.attn.to_out[0])]

        def below(*_: Any, **__: Any) -> tuple[torch.Tensor]:
            for module in inner:
                module(hidden)
            return (latents,)

        hooks = [hook for layer in here.layers.cross for hook in layer.hooks.values()]
        for hook in hooks:
            hook.below = lambda x, *_: x
        here.hook.below = below
        guarded = median(lambda: unet(**call), given.rounds, given.device)
        for module in inner:
            module.forward = lambda x, *_: x
        bare = median(below, given.rounds, given.device)
    guard = guarded - bare
    card = {
        "command": f"python benchmarks/guard_overhead.py --model {given.model} --device {given.device}",
        "model": given.model,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "layers": record["layers"],
        "step_seconds": step,
        "guard_seconds": guard,
        "share_of_a_step": guard / step,
        "target": TARGET,
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(card, indent=1))
    cards = json.loads(OUT.read_text("utf-8")) if OUT.exists() else []
    same = [(c["model"], c["device"]) == (card["model"], card["device"]) for c in cards]
    cards = [c for c, replaced in zip(cards, same, strict=True) if not replaced] + [card]
    OUT.write_text(json.dumps(cards, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
