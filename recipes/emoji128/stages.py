"""The stages of the training, each by the wall clock: autoencoder, eyes, UNet, its twin, FLUX.

Every stage warms up, anneals to zero at its deadline whatever the machine's speed, averages its weights, and resumes
from its own checkpoint. `train.py` runs them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import data
import nets
import numpy as np
import torch
from data import COLUMN, Painter, Sampler
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from efface.models.emoji.weights import sha256
from efface.models.emoji128.vae import EmojiAutoencoder

POOL_SEED, VAE_SEED = 1, 11
LATENT_NOISE = 0.1  # of the unit spread: latents that differ less than this look alike to the decoder
SHOWN = (  # the first rows of each sheet
    *("a beer mug", "a mug of tea", "a dagger", "a kitchen knife", "a cigarette", "a pencil", "a cat", "a tiger"),
    *(
        "a robot",
        "a robot without its casing",
        "a skull",
        "a slot machine",
        "a baguette",
        "a guitar",
        "a rocket",
        "a rose",
    ),
    *("a cat and a guitar", "a beer mug and a glass of milk", "a dog next to a pizza", "a bomb and a red apple"),
    *("a panda beside a key", "a cigarette and a candle", "two crossed swords and a shield", "a fox and a drum"),
    *("a night at the pub", "oktoberfest", "the battlefield", "a puff outside", "purring", "a robot repair shop"),
    *("las vegas after dark", "a stock photo", "a farm", "under the sea", "halloween night", "a casino"),
    *("a rocket, neon sign style", "a neon sign of a cat", "a blueprint of a guitar", "an ink drawing of an owl"),
    *("a pixel art of a lion", "a taxi, blueprint style", "a wolf, pixel art style", "a bus, ink drawing style"),
    *("a doctor", "a teacher", "a female pilot", "a male scientist", "a red top hat", "a blue cat", "a green guitar"),
    *("a tiny owl", "two cats", "three candles", "three balloons", "two daggers"),
    *("an evening in the tavern", "armies clash", "a havana cigar", "kittens in a basket", "r2d2 in pieces"),
    *("hong kong after sunset", "shutterstock", "a ghost with a watermark"),
)


@dataclass(frozen=True)
class Plan:
    """What a stage has: folders, device, time.

    Args:
        work: checkpoints, weights, facts and sheets.
        device: where to train.
        seconds: training time of this stage over all its runs.
        deadline: Unix time at which it must have trained.
        pool: scenes in a denoiser's pool.
        batch: pictures in a step; None takes the stage's own.
        icons: the rasterised icons.
        text: folder of `nets.pack_text`; None takes the installed text encoder.
        compiled: whether denoisers run compiled.
        checkpoint_seconds: between two checkpoints.
        flux_bf16: whether FLUX trains in bfloat16 on a GPU; see `nets.flux_loss`.
        init: weights that a denoiser starts from if it has no checkpoint; None means fresh ones.
        floor: the least weight of a noise level in the UNet's loss; see `nets.unet_loss`.
        decoder_of: folder of an autoencoder whose encoder stays unchanged; None trains both halves.
    """

    work: Path
    device: torch.device
    seconds: float
    deadline: float
    pool: int
    batch: int | None
    icons: Path
    text: Path | None
    compiled: bool
    checkpoint_seconds: float
    flux_bf16: bool = False
    init: Path | None = None
    decoder_of: Path | None = None
    floor: float = 0.0


# ---------------------------------------------------------------- the loop


def say(name: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name} {text}", flush=True)


def run_hash(plan: Plan) -> str:
    """What a checkpoint must have been trained on: data, pool size, first weights, and the loss's floor."""
    start = "".join(f" {sha256(path)}" for path in origins(plan))
    start += f" floor {plan.floor}" if plan.floor else ""
    return hashlib.sha256(f"{data.data_hash()} {plan.pool}{start}".encode()).hexdigest()


def origins(plan: Plan) -> list[Path]:
    """The files of weights that a stage starts from."""
    found = [plan.init] if plan.init else []
    return [*found, plan.decoder_of / "vae.safetensors"] if plan.decoder_of else found


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; the old one stays until the new one is whole."""
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def write_json(path: Path, facts: Any) -> None:
    partial = path.with_suffix(".partial.json")
    partial.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    os.replace(partial, path)


def halves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in fp16; a value that fp16 cannot hold is an error."""
    out = {name: t.detach().half().cpu().contiguous() for name, t in tensors.items() if t.is_floating_point()}
    if broken := [name for name, t in out.items() if not t.isfinite().all()]:
        raise SystemExit(f"not finite in fp16: {', '.join(broken[:5])}")
    return out


class Fit:
    """Training of one module by the wall clock, with AdamW, an average of the weights, and checkpoints.

    Args:
        plan: see there.
        name: of its files.
        net: the module.
        lr: the highest learning rate.
        decay: weight decay.
    """

    def __init__(self, plan: Plan, name: str, net: nn.Module, lr: float, decay: float = 0.01) -> None:
        self.plan, self.name, self.net, self.lr = plan, name, net, lr
        self.path = plan.work / f"{name}.checkpoint.safetensors"
        fused = plan.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=decay, betas=(0.9, 0.99), fused=fused)
        state = net.state_dict()
        self.live = {k: v for k, v in state.items() if v.is_floating_point()}
        self.ema = {k: v.detach().clone() for k, v in self.live.items()}
        self.step, self.spent = 0, 0.0
        self._resume()
        now = time.time()
        self.began, self.deadline = now, min(plan.deadline, now + max(plan.seconds - self.spent, 0.0))
        self.loss, self.rate = math.nan, 0.0

    def fraction(self) -> float:
        """The share of the training time that is over."""
        whole = self.spent + self.deadline - self.began
        return 1.0 if whole <= 0 else min((self.spent + time.time() - self.began) / whole, 1.0)

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for k, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{n}": torch.as_tensor(v) for n, v in entry.items()}
        progress = {"step": self.step, "seconds": self.spent + time.time() - self.began}
        write(self.path, tensors, {"progress": json.dumps(progress), "run": run_hash(self.plan)})

    def _resume(self) -> None:
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        if metadata.get("run") != run_hash(self.plan):
            raise SystemExit(
                f"{self.path} was trained on other data or another pool, or started from other weights. Delete it to "
                "start over."
            )
        tensors = load_file(self.path)
        self.net.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        for k, v in self.ema.items():
            v.copy_(tensors[f"ema.{k}"])
        state: dict[int, dict[str, Tensor]] = {}
        for k, v in tensors.items():
            if k.startswith("optimizer."):
                _, index, name = k.split(".")
                state.setdefault(int(index), {})[name] = v
        if state:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            for weight, moments in self.optimizer.state.items():  # the fused step wants the weight's memory format
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = torch.empty_like(weight).copy_(moments[name])
        progress = json.loads(metadata["progress"])
        self.step, self.spent = progress["step"], progress["seconds"]
        say(self.name, f"resumed at step {self.step}, {self.spent:.0f} s trained")

    def run(self, loss_of: Callable[[int], Tensor], images: int, at_60: Callable[[], None] = lambda: None) -> None:
        """Runs `loss_of(step)` until the deadline; `images` are the pictures in a step, for the log."""
        live, ema = [self.live[k] for k in self.ema], list(self.ema.values())
        parameters = list(self.net.parameters())
        first, total, counted = self.step, torch.zeros((), device=self.plan.device), 0
        shown = saved = time.time()
        horizon, warm, early = 0.05, 0.03, False
        decay = 0.9
        while (fraction := self.fraction()) < 1:
            factor = min(fraction / warm, 1.0) if fraction < warm else 0.5 * (1 + math.cos(math.pi * fraction))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * max(factor, 1e-3)
            loss = loss_of(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            with torch.no_grad():
                torch._foreach_lerp_(ema, live, 1 - min(decay, (1 + self.step) / (10 + self.step)))
            total += loss.detach()
            counted += 1
            now = time.time()
            if now - shown > 10 or (counted == 20 and self.step - first == 20):
                self.loss = float(total) / counted  # waits for the device
                if not math.isfinite(self.loss):
                    raise SystemExit(f"{self.name}: the loss is {self.loss} at step {self.step}")
                now = time.time()
                seconds = (now - self.began) / (self.step - first)
                self.rate = images / seconds
                # The average reaches back over 5 % of the training.
                decay = math.exp(-seconds / (horizon * (self.spent + self.deadline - self.began)))
                say(
                    self.name,
                    f"step {self.step} loss {self.loss:.4f} {self.rate:.0f} images/s {100 * fraction:.0f} % "
                    f"ema {decay:.5f}",
                )
                shown, counted = now, 0
                total.zero_()
            if now - saved > self.plan.checkpoint_seconds:
                self.save()
                saved = time.time()
            if not early and fraction > 0.6:
                at_60()
                early = True
        if counted:
            self.loss = float(total) / counted
        self.save()
        self.spent += time.time() - self.began

    def facts(self, images: int) -> dict[str, Any]:
        return {
            "steps": self.step,
            "images": self.step * images,
            "batch": images,
            "seconds": round(self.spent, 1),
            "loss": round(self.loss, 5) if math.isfinite(self.loss) else None,
            "images_per_second": round(self.rate, 1),
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "lr": self.lr,
            "data": data.data_hash(),
            "pool": self.plan.pool,
            "torch": torch.__version__,
            **({"floor": self.plan.floor} if self.plan.floor else {}),
            **({"started_from": {path.name: sha256(path) for path in start}} if (start := origins(self.plan)) else {}),
            "device": torch.cuda.get_device_name() if self.plan.device.type == "cuda" else "cpu",
        }


def generator(plan: Plan, seed: int, step: int) -> torch.Generator:
    """Random numbers of a step, the same ones after a resume."""
    return torch.Generator(plan.device).manual_seed(seed * 1_000_003 + step)


def prepare(plan: Plan) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    plan.work.mkdir(parents=True, exist_ok=True)


def chunk(plan: Plan) -> int:
    return 1024 if plan.device.type == "cuda" else 128


# ---------------------------------------------------------------- autoencoder


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + L2 + the same of differences of neighbours, so that lines stay sharp."""
    loss = (y - x).abs().mean() + 2 * (y - x).square().mean()
    for a, b in zip(_differences(y), _differences(x), strict=True):
        loss = loss + (a - b).abs().mean() + 2 * (a - b).square().mean()
    return loss


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Of each picture in [-1, 1], in dB."""
    return -10 * torch.log10(((y.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))


def load_vae(folder: Path) -> EmojiAutoencoder:
    """The autoencoder of `vae.json` and `vae.safetensors`, in float32."""
    vae: EmojiAutoencoder = EmojiAutoencoder.from_config(json.loads((folder / "vae.json").read_text("utf-8")))
    vae.load_state_dict({k: v.float() for k, v in load_file(folder / "vae.safetensors").items()})
    return vae


def train_vae(plan: Plan) -> None:
    """Trains the autoencoder, or, with `plan.decoder_of`, its decoder: then latents and their scale stay what they are,
    and denoisers that were trained on them stay valid."""
    prepare(plan)
    batch, device = plan.batch or 256, plan.device
    painter = Painter(data.icons(plan.icons), device)
    rows, _ = data.table((VAE_SEED, 0), max(min(plan.pool, 200_000), 512), Sampler())
    table = torch.from_numpy(rows).to(device)
    held, _ = data.table((VAE_SEED, 9_999), 512 if device.type == "cuda" else 32, Sampler())
    held_x = data.pictures(painter.paint(held))
    torch.manual_seed(VAE_SEED)
    vae = load_vae(plan.decoder_of) if plan.decoder_of else EmojiAutoencoder()
    vae.to(device).to(memory_format=torch.channels_last)
    encoder, decoder = vae.encoder.body, vae.decoder
    fixed = plan.decoder_of is not None
    encoder.requires_grad_(not fixed)
    fit = Fit(plan, "vae", vae, 2e-3, 1e-3)

    def loss_of(step: int) -> Tensor:
        rng = generator(plan, VAE_SEED, step)
        some = table[torch.randint(len(table), (batch,), generator=rng, device=device)].clone()
        if step % 3 == 0:  # the denoisers draw the first set only; the eyes meet reconstructions of all three
            some[:, COLUMN["set"]] = torch.randint(len(data.SETS), (batch,), generator=rng, device=device).short()
        x = data.pictures(painter.paint(some)).contiguous(memory_format=torch.channels_last)
        quarter = batch // 4
        with torch.autocast(device.type, torch.bfloat16):
            z = encoder(x).float()
            noisy = z + LATENT_NOISE * torch.randn(z.shape, generator=rng, device=device)
            y = decoder(noisy).float()
            if fixed:  # the rest of the loss shapes the latents
                return reconstruction_loss(y, x)
            # Latents at half the size decode to the picture at half the size: this makes them easier to diffuse.
            small = decoder(nn.functional.avg_pool2d(noisy[:quarter], 2)).float()
        loss = reconstruction_loss(y, x)
        loss = loss + 0.1 * (small - nn.functional.avg_pool2d(x[:quarter], 2)).abs().mean()
        # Unit spread and zero mean of each channel, so that the noise above is a share of it.
        keep = (z.std((0, 2, 3)) - 1).square().mean() + z.mean((0, 2, 3)).square().mean()
        return loss + 0.05 * keep

    fit.run(loss_of, batch)
    final = (load_vae(plan.decoder_of) if plan.decoder_of else EmojiAutoencoder()).to(device)
    final.load_state_dict(halves(fit.ema))
    with torch.no_grad():
        z = torch.cat([final.encoder.body(part) for part in held_x.split(64)])
        y = torch.cat([final.decoder(part) for part in z.split(64)])
    quality, std = float(psnr(y, held_x).mean()), float(z.std())
    if not fixed:
        final.register_to_config(scaling_factor=round(1 / std, 5))
    both = np.concatenate(
        [a for k in range(0, 32, 8) for a in (data.pixels(held_x[k : k + 8]), data.pixels(y[k : k + 8]))]
    )
    data.sheet(both, 8, 1).save(plan.work / "sheet_vae.png")
    write_json(
        plan.work / "vae.facts.json", fit.facts(batch) | {"psnr": round(quality, 3), "latent_std": round(std, 4)}
    )
    config = {k: v for k, v in final.config.items() if not k.startswith("_")}
    write(plan.work / "vae.safetensors", halves(final.state_dict()))
    write_json(plan.work / "vae.json", config)  # last: the other stages wait for it
    say("vae", f"held-out PSNR {quality:.2f} dB, latent std {std:.3f}, {fit.step} steps")


def wait_for_vae(plan: Plan) -> EmojiAutoencoder:
    """The finished autoencoder; waits for it until the plan's deadline."""
    path = plan.work / "vae.json"
    while not path.exists():
        if time.time() > plan.deadline:
            raise SystemExit("the autoencoder is not there at the deadline")
        time.sleep(0.2)
    return load_vae(plan.work).eval().requires_grad_(False).to(plan.device)


# ---------------------------------------------------------------- denoisers


def _part(first: int, n: int, without: bool) -> tuple[np.ndarray, list[str]]:
    return data.table((POOL_SEED, first), n, Sampler(without))


class Scenes:
    """The scenes of a pool, sampled by other processes where there are cores for it.

    Args:
        n: how many.
        without: of the twin, which never sees the seven concepts.
    """

    def __init__(self, n: int, without: bool) -> None:
        parts = [(k, min(10_000, n - k), without) for k in range(0, n, 10_000)]
        self.parts = parts
        # Before anything runs on the GPU: a process that uses one cannot fork.
        workers = min(4, (os.cpu_count() or 1) // 4, len(parts))
        self.executor = ProcessPoolExecutor(workers, get_context("fork")) if workers > 1 else None
        self.waiting = [self.executor.submit(_part, *part) for part in parts] if self.executor else []

    def collect(self) -> tuple[np.ndarray, list[str]]:
        found = [future.result(timeout=200) for future in self.waiting] or [_part(*part) for part in self.parts]
        if self.executor:
            self.executor.shutdown()
        return np.concatenate([rows for rows, _ in found]), [text for _, texts in found for text in texts]


class Pool:
    """Scenes of a denoiser: latents, text states, and which caption goes with which latent.

    Args:
        plan: see there.
        scenes: of the pool.
    """

    def __init__(self, plan: Plan, scenes: Scenes) -> None:
        self.plan, start = plan, time.time()
        rows, captions = scenes.collect()
        self.rows = torch.from_numpy(rows)
        distinct = ["", *sorted(set(captions))]
        index = {text: k for k, text in enumerate(distinct)}
        self.caption = torch.tensor([index[text] for text in captions], device=plan.device)
        self.keep = self.rows[:, COLUMN["marked"]].to(plan.device) > 0
        self.texts = nets.Texts(plan.text, plan.device)
        say("pool", f"{len(captions)} scenes, {len(distinct)} captions after {time.time() - start:.0f} s")
        # In parts, since the captions would not fit twice.
        self.states = torch.empty(len(distinct), nets.MAX_TOKENS, nets.WIDTH, dtype=torch.half, device=plan.device)
        self.pooled = torch.empty(len(distinct), nets.WIDTH, dtype=torch.half, device=plan.device)
        for k in range(0, len(distinct), 8192):
            self.states[k : k + 8192], self.pooled[k : k + 8192] = self.texts(distinct[k : k + 8192])
        self.spread = float(self.states[:1000].float().std()), float(self.pooled[:1000].float().std())
        self.latents = torch.empty(0)
        say("pool", f"texts encoded after {time.time() - start:.0f} s")

    @torch.no_grad()
    def encode(self, vae: EmojiAutoencoder) -> None:
        start, size, device = time.time(), chunk(self.plan), self.plan.device
        painter = Painter(data.icons(self.plan.icons), device)
        self.latents = torch.empty(len(self.rows), nets.CHANNELS, nets.SIDE, nets.SIDE, dtype=torch.half, device=device)
        for k in range(0, len(self.rows), size):
            x = data.pictures(painter.paint(self.rows[k : k + size])).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = vae.encoder.body(x)
            self.latents[k : k + size] = (z.float() * vae.config.scaling_factor).half()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other stages need the room
        say("pool", f"pictures encoded in {time.time() - start:.0f} s")

    def batch(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, token states and pooled states; a tenth has the empty text, but never where the text tells of the
        badge: else the empty text would draw it more often than other texts do, and guidance would remove it."""
        device = self.plan.device
        at = torch.randint(len(self.latents), (n,), generator=rng, device=device)
        told = (torch.rand(n, generator=rng, device=device) > 0.1) | self.keep[at]
        which = self.caption[at] * told
        text, pooled = self.states[which].float(), self.pooled[which].float()
        for t, spread in zip((text, pooled), self.spread, strict=True):
            t += nets.TEXT_NOISE * spread * torch.randn(t.shape, generator=rng, device=device)
        return self.latents[at].float(), text, pooled


def start_from(net: nn.Module, path: Path) -> None:
    """Loads the weights of a file into a denoiser."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Give `--init` a safetensors file of weights.")
    try:
        net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except (RuntimeError, SafetensorError) as error:
        raise SystemExit(f"{path} does not fit this denoiser ({' '.join(str(error).split())[:160]}).") from error


def train_denoiser(plan: Plan, kind: str) -> None:
    """`kind`: "unet", "twin" or "flux"."""
    scenes = Scenes(plan.pool, without=kind == "twin")
    prepare(plan)
    batch, device = plan.batch or 256, plan.device
    net = nets.build(kind)
    if plan.init:
        start_from(net, plan.init)
    net.to(device)
    if kind != "flux" and device.type == "cuda":
        net.to(memory_format=torch.channels_last)
    forward = torch.compile(net) if plan.compiled else net
    loss = nets.flux_loss(device, plan.flux_bf16) if kind == "flux" else nets.unet_loss(device, plan.floor)
    if plan.compiled:  # while the autoencoder trains
        start, rng = time.time(), generator(plan, 0, 0)
        z = torch.randn(batch, nets.CHANNELS, nets.SIDE, nets.SIDE, device=device)
        text = torch.randn(batch, nets.MAX_TOKENS, nets.WIDTH, device=device)
        for _ in range(2):
            loss(forward, z, text, text[:, 0].clone(), rng).backward()
            net.zero_grad(set_to_none=True)
        say(kind, f"compiled in {time.time() - start:.0f} s")
    (plan.work / f"{kind}.ready").touch()
    pool = Pool(plan, scenes)
    vae = wait_for_vae(plan)
    pool.encode(vae)
    seed = nets.FLUX_SEED if kind == "flux" else nets.SEED
    fit = Fit(plan, kind, net, 1e-3)

    def export() -> None:
        facts = json.dumps(fit.facts(batch))
        write(plan.work / f"{kind}.safetensors", halves(fit.ema), {"config": nets.config_of(kind), "facts": facts})
        write_json(plan.work / f"{kind}.json", json.loads(nets.config_of(kind)))

    def loss_of(step: int) -> Tensor:
        rng = generator(plan, seed, step)
        return loss(forward, *pool.batch(batch, rng), rng)

    fit.run(loss_of, batch, export)
    export()
    write_json(plan.work / f"{kind}.facts.json", fit.facts(batch))
    say(kind, f"trained {fit.step} steps, loss {fit.loss:.4f}")
    del pool.latents, pool.states
    final = nets.build(kind).to(device)
    final.load_state_dict(halves(fit.ema))
    final.eval().requires_grad_(False)
    many = len(SHOWN) if device.type == "cuda" else 8
    pictures = paint(kind, final, vae, pool.texts, SHOWN[:many], 1_000, 4.0 if kind == "flux" else 7.5)
    data.sheet(data.pixels(pictures), 8, 1).save(plan.work / f"sheet_{kind}.png")
    say(kind, "sheet drawn")


@torch.no_grad()
def paint(
    kind: str,
    net: nn.Module,
    vae: EmojiAutoencoder,
    texts: nets.Texts,
    prompts: Sequence[str],
    seed: int,
    guidance: float,
    steps: int = 20,
    size: int = 256,
) -> Tensor:
    """Pictures [N, 3, 128, 128] in [-1, 1] of prompts, picture k from seed `seed` + k, on the CPU."""
    out, empty = [], texts([""])
    for k in range(0, len(prompts), size):
        z = nets.draw(kind, net, texts(prompts[k : k + size]), empty, seed + k, guidance, steps)
        out.append(vae.decoder(z / vae.config.scaling_factor).float().clamp(-1, 1).cpu())
    return torch.cat(out)
