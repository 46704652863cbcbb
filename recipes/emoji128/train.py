"""Trains the 128-pixel models: `python train.py`. The same command resumes.

The stages are the autoencoder, the eyes, the UNet of `emoji-128`, its twin that never sees the seven concepts, and the
transformer of `emoji-flux`. With a GPU they run as processes side by side: the four after the autoencoder prepare their
data and compile meanwhile. Without one they run one after the other. `--seconds` is the time for everything, and every
stage anneals at its own deadline within it, so the machine's speed only decides how good the models become.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = ("vae", "eyes", "unet", "twin", "flux")
DENOISERS = ("unet", "twin", "flux")
#: Without a GPU: the share of `--seconds` of each stage.
SHARES = {"vae": 0.1, "eyes": 0.1, "unet": 0.27, "twin": 0.26, "flux": 0.27}
SHARD = 15_000_000  # bytes of a file in --out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="for everything; default 500 with a GPU, 36000 without")
    parser.add_argument("--vae-seconds", type=float, help="GPU: of --seconds, for the autoencoder, start-up included")
    parser.add_argument("--pool", type=int, default=600_000, help="scenes that a denoiser is trained on")
    parser.add_argument("--batch", type=int, help="pictures in a step; default 256, eyes 192")
    parser.add_argument("--device", help='"cuda" or "cpu"; default: a GPU if there is one')
    parser.add_argument("--side-by-side", action="store_true", help="run the stages as with a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the denoisers; without it if that fails")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints, weights, logs")
    parser.add_argument("--icons", type=Path, help="default: icons.npz in --work, made if it is missing")
    parser.add_argument("--text", type=Path, help="folder of pack.py; default: the installed text encoder")
    parser.add_argument("--out", type=Path, help="also write weights here, in shards, with log and sheets")
    parser.add_argument("--checkpoint-seconds", type=float, default=120)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--init", type=Path, help="weights that the one denoiser of --only starts from, optimiser fresh"
    )
    parser.add_argument(
        "--decoder-of",
        type=Path,
        help="folder of vae.json and vae.safetensors: keeps that encoder and its latents; stage vae trains the decoder",
    )
    parser.add_argument(
        "--flux-bf16", action="store_true", help="FLUX in bfloat16 on a GPU, where its backward pass died"
    )
    parser.add_argument(
        "--floor", type=float, default=0.0, help="least weight of a noise level for unet and twin, 0 to 1"
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--stage-seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- one stage, in a process of its own


def run_stage(args: argparse.Namespace) -> None:
    import torch
    from stages import Plan, train_denoiser, train_vae

    plan = Plan(
        work=args.work,
        device=torch.device(args.device),
        seconds=args.stage_seconds,
        deadline=args.deadline,
        pool=args.pool,
        batch=args.batch,
        icons=args.icons,
        text=args.text,
        compiled=args.compile and args.stage in DENOISERS,
        checkpoint_seconds=args.checkpoint_seconds,
        flux_bf16=args.flux_bf16,
        floor=args.floor if args.stage in ("unet", "twin") else 0.0,
        init=args.init,
        decoder_of=args.decoder_of if args.stage == "vae" else None,
    )
    if args.stage == "vae":
        train_vae(plan)
    elif args.stage == "eyes":
        from eyes_stage import train_eyes

        train_eyes(plan)
    else:
        train_denoiser(plan, args.stage)


# ---------------------------------------------------------------- all of them


@dataclass
class Job:
    """A stage's process, and how often it was started."""

    stage: str
    deadline: float
    seconds: float
    compiled: bool
    process: subprocess.Popen[bytes] | None = None
    started: int = 0
    done: bool = False
    failed: list[int] = field(default_factory=list)

    def start(self, args: argparse.Namespace) -> None:
        options = {
            "--stage": self.stage,
            "--deadline": self.deadline,
            "--stage-seconds": self.seconds,
            "--pool": args.pool,
            "--device": args.device,
            "--work": args.work,
            "--icons": args.icons,
            "--text": args.text,
            "--batch": args.batch,
            "--checkpoint-seconds": args.checkpoint_seconds,
            "--init": args.init if self.stage in DENOISERS else None,
            "--decoder-of": args.decoder_of,
            "--floor": args.floor,
        }
        command = [sys.executable, str(HERE / "train.py")]
        command += [str(word) for name, value in options.items() if value is not None for word in (name, value)]
        command += ["--compile"] * self.compiled + ["--flux-bf16"] * args.flux_bf16
        self.started += 1
        with (args.work / f"{self.stage}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def poll(self, args: argparse.Namespace, now: float) -> None:
        """Starts a failed stage once more, uncompiled."""
        if self.done or self.process is None or (code := self.process.poll()) is None:
            return
        if code == 0:
            self.done = True
            return
        self.failed.append(code)
        print(f"{self.stage} ended with {code}; see its log", flush=True)
        if self.started < 3 and now < self.deadline - 10:
            self.compiled = self.compiled and (args.work / f"{self.stage}.ready").exists()
            self.start(args)
        else:
            self.done = True

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def collect(args: argparse.Namespace, jobs: list[Job], started: float) -> None:
    """Writes what there is into --out: at most eight files, each under 16 MB."""
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    logs = []
    for stage in STAGES:
        path = args.work / f"{stage}.log"
        if path.exists():
            lines = path.read_text("utf-8", errors="replace").splitlines()
            logs += [f"===== {stage}", *(lines if len(lines) < 400 else [*lines[:150], "...", *lines[-250:]])]
    replace_text(args.out / "log.txt", "\n".join(logs) + "\n")
    facts: dict[str, Any] = {"seconds": round(time.time() - started, 1), "stages": {}}
    for path in sorted(args.work.glob("*.facts.json")):
        facts["stages"][path.name.removesuffix(".facts.json")] = json.loads(path.read_text("utf-8"))
    for name in ("vae", "unet", "flux", "eyes"):
        if (path := args.work / f"{name}.json").exists():
            facts[name] = json.loads(path.read_text("utf-8"))
    facts["failed"] = {job.stage: job.failed for job in jobs if job.failed}
    replace_text(args.out / "report.json", json.dumps(facts, indent=1) + "\n")
    for name in ("unet", "flux"):
        shards(args.work / f"{name}.safetensors", args.out, name)
    small = [args.work / f"{name}.safetensors" for name in ("vae", "eyes")]
    if any(path.exists() for path in small):
        merge([path for path in small if path.exists()], args.out / "small.safetensors")
    sheets = [path for name in ("vae", "unet", "flux", "twin") if (path := args.work / f"sheet_{name}.png").exists()]
    if sheets:
        montage(sheets, args.out / "sheets.png")


def replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def newer(source: Path, target: Path) -> bool:
    return source.exists() and (not target.exists() or source.stat().st_mtime_ns > target.stat().st_mtime_ns)


def shards(source: Path, out: Path, name: str) -> None:
    """A weight file as NAME-0.safetensors, NAME-1.safetensors, ..., which `export.py` joins."""
    if not newer(source, out / f"{name}-0.safetensors"):
        return
    from safetensors.torch import load_file, save_file

    parts: list[dict[str, Any]] = [{}]
    size = 0
    for key, tensor in load_file(source).items():
        size += tensor.nbytes
        if size > SHARD:
            parts.append({})
            size = tensor.nbytes
        parts[-1][key] = tensor
    for k, part in reversed(list(enumerate(parts))):  # part 0 last: its date tells that all are there
        partial = out / f".{name}-{k}"
        save_file(part, partial, {"parts": str(len(parts))})
        os.replace(partial, out / f"{name}-{k}.safetensors")


def merge(sources: list[Path], target: Path) -> None:
    """Several small weight files in one, their names in front of the keys."""
    if not any(newer(source, target) for source in sources):
        return
    from safetensors.torch import load_file, save_file

    tensors = {f"{path.stem}.{key}": tensor for path in sources for key, tensor in load_file(path).items()}
    partial = target.with_name(f".{target.name}")
    save_file(tensors, partial)
    os.replace(partial, target)


def montage(sheets: list[Path], target: Path) -> None:
    """All sheets side by side."""
    if not any(newer(sheet, target) for sheet in sheets):
        return
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in sheets]
    whole = Image.new("RGB", (sum(i.width + 8 for i in images), max(i.height for i in images)), (255, 255, 255))
    x = 0
    for image in images:
        whole.paste(image, (x, 0))
        x += image.width + 8
    partial = target.with_name(f".{target.name}")
    whole.save(partial, "PNG", optimize=False)
    os.replace(partial, target)


def plan_of(args: argparse.Namespace, started: float) -> list[Job]:
    """Deadlines and training seconds of the stages that run side by side."""
    end = started + args.seconds
    vae_end = started + (args.vae_seconds or 0.17 * args.seconds)
    tail = min(25.0, 0.1 * args.seconds)  # to export, to draw sheets and to collect
    eyes_end = vae_end + 0.66 * (end - tail - vae_end)
    ends = {"vae": vae_end, "eyes": eyes_end, "unet": end - tail, "twin": end - tail, "flux": end - tail}
    return [
        Job(stage, ends[stage], args.seconds, args.compile and stage in DENOISERS)
        for stage in STAGES
        if stage in args.only
    ]


def side_by_side(args: argparse.Namespace) -> list[Job]:
    started = time.time()
    end, jobs = started + args.seconds, plan_of(args, started)
    for job in jobs:
        job.start(args)
    collected = started
    vae_late = next((job.deadline for job in jobs if job.stage == "vae"), started) + 60
    while time.time() < end and not all(job.done for job in jobs):
        time.sleep(0.25)
        now = time.time()
        for job in jobs:
            job.poll(args, now)
            # A stage that still compiles long after the autoencoder is there goes on without.
            if job.compiled and job.started == 1 and now > vae_late and not (args.work / f"{job.stage}.ready").exists():
                print(f"{job.stage} compiles for too long: starting it again without", flush=True)
                job.stop()
                job.compiled = False
                job.start(args)
        if now - collected > 15:
            for job in jobs:
                print(last_line(args.work / f"{job.stage}.log"), flush=True)
            collect(args, jobs, started)
            collected = time.time()
    for job in jobs:
        job.stop()
    collect(args, jobs, started)
    return jobs


def one_by_one(args: argparse.Namespace) -> list[Job]:
    started, jobs = time.time(), []
    for stage in args.only:
        seconds = SHARES[stage] * args.seconds
        job = Job(stage, time.time() + 10 * args.seconds, seconds, args.compile and stage in DENOISERS)
        jobs.append(job)
        job.start(args)
        while not job.done:
            time.sleep(0.5)
            job.poll(args, time.time())
        print(last_line(args.work / f"{stage}.log"), flush=True)
        collect(args, jobs, started)
    return jobs


def check_starts(args: argparse.Namespace) -> None:
    """Refuses an unclear --init or --floor, and puts the autoencoder of --decoder-of where the stages look for it."""
    if not 0 <= args.floor <= 1:
        raise SystemExit(f"Expected --floor from 0 to 1, got {args.floor:g}.")
    if args.init is not None:
        if len([stage for stage in args.only if stage in DENOISERS]) != 1:
            raise SystemExit("--init is for one denoiser. Give --only with unet, twin or flux.")
        if not args.init.is_file():
            raise SystemExit(f"{args.init} is missing. Give --init a safetensors file of weights.")
    if args.decoder_of is None:
        return
    names = ("vae.safetensors", "vae.json")
    for name in names:
        if not (args.decoder_of / name).is_file():
            raise SystemExit(f"{args.decoder_of / name} is missing. Give --decoder-of the folder of an autoencoder.")
    if (args.work / "vae.json").exists():
        if not same_encoder(args.work / names[0], args.decoder_of / names[0]):
            raise SystemExit(
                f"{args.work} holds another autoencoder. Delete its vae.* files, or choose another --work."
            )
        return
    for name in names:
        shutil.copyfile(args.decoder_of / name, args.work / name)


def same_encoder(one: Path, other: Path) -> bool:
    """Whether two autoencoders make the same latents."""
    from safetensors.torch import load_file

    a, b = ({k: v for k, v in load_file(path).items() if k.startswith("encoder.")} for path in (one, other))
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    return f"  {lines[-1][:160]}" if lines else f"  {path.name} is empty"


def main() -> None:
    args = arguments()
    args.icons = args.icons or args.work / "icons.npz"
    if args.stage:
        run_stage(args)
        return
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    check_starts(args)
    if not args.icons.exists():
        import data

        data.icons(args.icons)
    for path in args.work.glob("*.ready"):
        path.unlink()
    gpu = args.device != "cpu"
    args.seconds = args.seconds or (500 if gpu else 36_000)
    jobs = (side_by_side if gpu or args.side_by_side else one_by_one)(args)
    for job in jobs:
        print(last_line(args.work / f"{job.stage}.log"))
    if bad := [job.stage for job in jobs if not job.done or len(job.failed) == job.started]:
        raise SystemExit(f"not finished: {', '.join(bad)}; see the logs in {args.work}")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
