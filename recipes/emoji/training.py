"""What the training scripts share: full checkpoints that the same command resumes, and progress lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"optimizer.{k}.{n}": t for k, s in optimizer.state_dict()["state"].items() for n, t in s.items()}


def save(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Writes weights, EMA, optimiser state, step and clock; the old file stays until the new one is whole."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()} | _flat(optimizer)
    partial = path.with_suffix(".partial")
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        partial,
        {"progress": json.dumps({"step": step, "seconds": seconds})},
    )
    os.replace(partial, path)


def resume(path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Loads what `save` wrote; (0, 0.0) if there is nothing yet."""
    if not path.exists():
        return 0, 0.0
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        progress = json.loads(f.metadata()["progress"])
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for k, v in ema.items():
        v.copy_(tensors[f"ema.{k}"])
    state: dict[int, dict[str, Tensor]] = {}
    for k, v in tensors.items():
        if k.startswith("optimizer."):
            _, index, name = k.split(".")
            state.setdefault(int(index), {})[name] = v
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for weight, moments in optimizer.state.items():  # the fused step wants the memory format of the weight
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(weight).copy_(moments[name])
    print(f"resumed {path.name} at step {progress['step']}", flush=True)
    return progress["step"], progress["seconds"]


class Clock:
    """Training by wall time: `fraction` of the budget spent, across interruptions."""

    def __init__(self, minutes: float, spent: float) -> None:
        self.budget, self.start = 60 * minutes, time.time() - spent

    @property
    def seconds(self) -> float:
        return time.time() - self.start

    @property
    def fraction(self) -> float:
        return min(self.seconds / self.budget, 1.0)


def cosine(fraction: float, warm: float = 0.02, floor: float = 0.02) -> float:
    """Learning rate factor: linear warm-up, then cosine to `floor`."""
    if fraction < warm:
        return max(fraction / warm, 0.01)
    import math

    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (fraction - warm) / (1 - warm)))


def train(
    name: str,
    work: Path,
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    minutes: float,
    lr: float,
    images: int,
    ema_decay: float = 0.999,
    weight_decay: float = 0.01,
    on_checkpoint: Callable[[dict[str, Tensor], int], None] = lambda ema, step: None,
    checkpoint_minutes: float = 5.0,
) -> dict[str, Tensor]:
    """Runs `loss_of(step)` and AdamW until `minutes` are spent; returns the EMA weights."""
    work.mkdir(exist_ok=True)
    path = work / f"{name}.safetensors"
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    floats = [k for k, v in ema.items() if v.is_floating_point()]
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    step, spent = resume(path, model, ema, optimizer)
    first, clock, saved, shown, losses = step, Clock(minutes, spent), time.time(), time.time(), []
    began = time.time()
    while clock.fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(clock.fraction)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        weights = model.state_dict()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([ema[k] for k in floats], [weights[k].detach() for k in floats], 1 - decay)
        losses.append(float(loss.detach()))
        if time.time() - shown > 20:
            rate = (step - first) * images / (time.time() - began)
            mean, spent = sum(losses) / len(losses), clock.seconds / 60
            print(f"{name} step {step} loss {mean:.4f} {rate:.0f} images/s {spent:.1f}/{minutes:g} min", flush=True)
            shown, losses = time.time(), []
        if time.time() - saved > 60 * checkpoint_minutes or clock.fraction >= 1:
            save(path, model, ema, optimizer, step, clock.seconds)
            on_checkpoint(ema, step)
            saved = time.time()
    return ema
