"""`efface serve` under load: leaks between tenants, throughput, delays, memory.

A server in a process of its own is asked by many clients over localhost. The same requests are drawn by the guard alone
and by the base pipeline, in batches of the same size, in the same run and with as many threads.

Policies of run-time methods show what the service and the methods cost together. Policies of deltas, which cost nothing
while drawing, show what the service costs: its batches have one policy each, because a model holds one set of deltas.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import efface
from efface import api
from efface.intervals import wilson
from efface.serve.app import create_app
from efface.serve.run import run as serve
from efface.serve.service import initialise
from efface.serve.worker import Worker

from .code import code_hash
from .runner import Experiment, Plan, Unit, machine, timed
from .worlds import SEEDS, World, named

CONCEPTS = ("alcohol", "weapon", "death", "cat", "neon sign")
POLICIES = 20
EDITED = tuple((concept,) for concept in CONCEPTS[:4])
"""What each policy of a delta erases: so few that a batch is full with the requests of one policy."""
BATCH, STEPS, CLIENTS, WARM = 8, 6, 40, 24
SEED = SEEDS["selection"].start + 400_000
Sets = Sequence[tuple[str, ...]]
"""What each policy erases."""
SAME = 2
"""Grey levels of 255 by which a picture may differ from the one that its policy draws in another batch."""
ANSWER = 600.0


def erased() -> list[tuple[str, ...]]:
    """What each policy erases."""
    sets = [some for size in (1, 2, 3) for some in itertools.combinations(CONCEPTS, size)]
    return sets[:POLICIES]


def policy(concepts: Sequence[str]) -> dict[str, Any]:
    return {"erase": _concepts(concepts)}


def _concepts(concepts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"name": each.name, "phrases": [*each.phrases]} for each in map(named, concepts)]


def delta_policy(pipe: Any, concepts: Sequence[str], folder: Path) -> dict[str, Any]:
    """A policy with a delta of UCE, which it fits into a folder."""
    path = folder / f"{'-'.join(concepts).replace(' ', '-')}.safetensors"
    if not path.is_file():
        efface.UCE().fit(pipe, [named(concept) for concept in concepts]).save(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"deltas": [{"file": path.name, "sha256": sha256, "concepts": _concepts(concepts)}]}


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request: its policy, its prompt, the concept that the prompt asks for, and its seed."""

    policy: int
    prompt: str
    concept: str
    seed: int


def prompts_of(world: World, concept: str, block: str) -> list[str]:
    """The prompts that ask for this concept and for no other; with another icon if there are none without."""
    others = {icon for each in CONCEPTS if each != concept for icon in world.truth(each) or ()}
    for cells in (("explicit", "theme", "paraphrase"), ("pair",)):
        every = [each for cell in cells for each in world.prompts(concept, cell, block)]
        if found := [text for text, keep in every if others.isdisjoint(keep)]:
            return found
    raise ValueError(f"The {block} block has no prompt for {concept!r} alone.")


def asks(world: World, block: str, numbers: Sequence[int], sets: Sets | None = None) -> list[Ask]:
    """Requests of all policies in turn. Half of them ask for an erased concept, half for one that others erase."""
    made, sets = [], erased() if sets is None else sets
    for number in numbers:
        policy, turn = number % len(sets), number // len(sets)
        of = sets[policy] if turn % 2 == 0 else [each for each in CONCEPTS if each not in sets[policy]]
        concept = of[turn // 2 % len(of)]
        prompts = prompts_of(world, concept, block)
        made.append(Ask(policy, prompts[turn // 2 % len(prompts)], concept, SEED + number))
    return made


class Server:
    """`efface serve run` in a process of its own, with a key for each policy.

    Args:
        folder: for the service.
        model: its model.
        policies: the entries of each policy.
        deltas: the folder of their deltas.
    """

    def __init__(
        self, folder: Path, model: str, policies: Sequence[Mapping[str, Any]], deltas: Path | None = None
    ) -> None:
        service, _ = initialise(folder / "service")
        self.keys = []
        for k, entries in enumerate(policies):
            service.policies.add(f"policy-{k:02}", entries, "load")
            self.keys.append(service.keys.add(f"tenant-{k:02}", f"policy-{k:02}")[1])
        service.database.close()
        command = [sys.executable, "-m", "efface", "serve", "run", str(folder / "service"), "--model", model]
        command += ["--port", "0", "--metrics-port", "0", "--batch", str(BATCH)]
        command += [] if deltas is None else ["--deltas", str(deltas)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        told: dict[str, Any] = {}
        while told.get("event") != "listening":
            if not (line := self.process.stderr.readline()):
                raise RuntimeError(f"The server ended with code {self.process.wait()}.")
            told = json.loads(line) if line.startswith("{") else told
        self.port = told["port"]
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def memory(self) -> float:
        """Resident MiB (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def ask(self, each: Ask) -> tuple[float, int, bytes]:
        """Seconds, status, and the picture."""
        body = json.dumps({"prompt": each.prompt, "seed": each.seed, "steps": STEPS, "response_format": "b64_json"})
        headers = {"authorization": f"Bearer {self.keys[each.policy]}", "content-type": "application/json"}
        began = time.monotonic()
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER)
        with contextlib.closing(line):
            line.request("POST", "/v1/images/generations", body, headers)
            answer = line.getresponse()
            content = json.loads(answer.read())
        picture = base64.b64decode(content["data"][0]["b64_json"]) if answer.status == 200 else b""
        return time.monotonic() - began, answer.status, picture

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def serving(
    model: str, policies: Sequence[Mapping[str, Any]] | None = None, deltas: Path | None = None
) -> Iterator[Server]:
    """A server that listens, with the policies of run-time methods or others."""
    made = [policy(concepts) for concepts in erased()] if policies is None else policies
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), model, made, deltas)
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def sampled(server: Server, every: float) -> Iterator[list[float]]:
    """The server's memory at equal times."""
    found, over = list[float](), threading.Event()

    def sample() -> None:
        while not over.wait(every):
            found.append(round(server.memory(), 1))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as the server has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """[N, 3, H, W] in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(each.convert("RGB"))).permute(2, 0, 1) / 255 for each in pictures])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load(Experiment):
    """Requests of 20 policies, in parts that are measured whole; or minutes of load, for the memory.

    Args:
        part: requests of a part. Each part has a server of its own.
        minutes: whether n counts minutes of one server instead.
        deltas: whether the policies have deltas instead of run-time methods.
    """

    name: str
    question: str
    cap: float
    n: int = 1_000
    model: str = "emoji"
    block: str = "selection"
    part: int = 250
    minutes: bool = False
    deltas: bool = False
    columns: ClassVar[Mapping[str, str]] = {"figures": "figures"}
    blocks: ClassVar[tuple[str, ...]] = ("selection",)

    def units(self, plan: Plan) -> list[Unit]:
        used = (create_app, serve, Worker, efface.EIUP, *((efface.UCE, efface.Delta) if self.deltas else ()), Load)
        facts = {"machine": machine(), "code": code_hash(*used)} | ({"deltas": len(EDITED)} if self.deltas else {})
        facts |= {"versions": plan.facts["versions"], "model": plan.model}
        facts |= {"batch": BATCH, "steps": STEPS, "clients": CLIENTS}

        def pilot() -> float:
            """Per request: base, guard, service and judging take about six times as long as the base alone."""
            return timed(lambda: self._base(plan.world, asks(plan.world, plan.block, range(BATCH))))[1] / BATCH * 6

        if self.minutes:
            setting = {**facts, "minutes": plan.n}
            return [Unit("service", setting, lambda: self._minutes(plan), plan.n * 60.0, lambda: 2.0)]
        made = []
        for first in range(0, plan.n, self.part):
            numbers = range(first, min(first + self.part, plan.n))
            setting = {**facts, "first": first, "requests": len(numbers)}
            made.append(
                Unit("service", setting, lambda some=numbers: self._part(plan, some), len(numbers), pilot)  # type: ignore[misc]
            )
        return made

    # ---- what a unit measures

    def _minutes(self, plan: Plan) -> dict[str, Any]:
        end, numbers = 0.0, itertools.count()
        with serving(plan.model) as server, sampled(server, 1.0) as memory:
            todo = asks(plan.world, plan.block, range(POLICIES * 20))
            end = time.monotonic() + plan.n * 60

            def client(_: int) -> list[int]:
                found = []
                while time.monotonic() < end:
                    found.append(server.ask(todo[next(numbers) % len(todo)])[1])
                return found

            with ThreadPoolExecutor(CLIENTS) as pool:
                statuses = [status for some in pool.map(client, range(CLIENTS)) for status in some]
        return {"memory": memory[:: max(len(memory) // 600, 1)], "requests": len(statuses), "ok": statuses.count(200)}

    def _part(self, plan: Plan, numbers: Sequence[int]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return self._measured(plan, numbers, Path(folder))

    def _measured(self, plan: Plan, numbers: Sequence[int], folder: Path) -> dict[str, Any]:
        sets, deltas = (EDITED, folder) if self.deltas else (erased(), None)
        make = partial(delta_policy, plan.world.pipe, folder=folder) if self.deltas else policy
        todo, policies = asks(plan.world, plan.block, numbers, sets), [make(concepts) for concepts in sets]
        with serving(plan.model, policies, deltas) as server, ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(server.ask, todo[:WARM]))
            with sampled(server, 0.5) as memory:
                began = time.monotonic()
                answers = list(pool.map(server.ask, todo))
                seconds = {"service": time.monotonic() - began}
        pictures = {"service": [Image.open(io.BytesIO(each)) for _, status, each in answers if status == 200]}
        if len(pictures["service"]) < len(todo):
            raise RuntimeError(f"Expected {len(todo)} pictures, got {len(pictures['service'])} from the server.")
        guard = efface.Guard({str(k): efface.Policy(**each) for k, each in enumerate(policies)}, deltas=deltas)
        draws: dict[str, Callable[[World, Sequence[Ask]], list[Image.Image]]] = {"base": self._base}
        draws["guard"] = partial(self._guard, guard)
        for name, draw in draws.items():
            began = time.monotonic()
            pictures[name] = draw(plan.world, todo)
            seconds[name] = time.monotonic() - began
        every = {name: tensor(some) for name, some in pictures.items()}
        apart = (every["service"] - every["guard"]).abs().amax((1, 2, 3)) * 255
        return {
            "policy": [each.policy for each in todo],
            "asked": [CONCEPTS.index(each.concept) for each in todo],
            "shows": {name: shown(plan.world, images) for name, images in every.items()},
            "apart": [round(float(each), 1) for each in apart],
            "delays": [round(each, 3) for each, _, _ in answers],
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "memory": memory,
        }

    @staticmethod
    def _base(world: World, todo: Sequence[Ask]) -> list[Image.Image]:
        made: list[Image.Image] = []
        with one_thread():
            for k in range(0, len(todo), BATCH):
                some = todo[k : k + BATCH]
                prompts, seeds = [each.prompt for each in some], [each.seed for each in some]
                images = api.draw(world.pipe, prompts, seeds, len(some), None, num_inference_steps=STEPS)
                made += efface.pictures.to_pil(images)
        return made

    def _guard(self, guard: efface.Guard, world: World, todo: Sequence[Ask]) -> list[Image.Image]:
        made: dict[int, Image.Image] = {}
        with one_thread():
            for numbers in batches(todo, self.deltas):
                some = [todo[k] for k in numbers]
                prompts, tenants = [each.prompt for each in some], [str(each.policy) for each in some]
                found = guard(world.pipe, prompts, tenants, [each.seed for each in some], num_inference_steps=STEPS)
                made |= {k: image for k, image in zip(numbers, found.images, strict=True) if image is not None}
        return [made[k] for k in range(len(todo))]

    # ---- what the card says

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        raw = [each["raw"] for _, each in found]
        if self.minutes:
            return minutes(plan.n, raw[0])
        sets = EDITED if self.deltas else erased()
        figures = {name: _figures(name, raw, sets) for name in ("service", "guard", "base")}
        figures["service"] |= _service(raw, sets)
        rows = [{"row": name, "figures": each} for name, each in figures.items()]
        return {"rows": rows, "ratios": _ratios(raw), "verdict": _verdict(figures["service"], _ratios(raw))}

    def names(self, units: Sequence[Unit]) -> list[str]:
        return ["service"]


def batches(todo: Sequence[Ask], apart: bool) -> list[list[int]]:
    """The numbers of the requests of each batch: in their order, or each policy's `apart`."""
    groups: dict[int, list[int]] = {}
    for k, each in enumerate(todo):
        groups.setdefault(each.policy if apart else 0, []).append(k)
    return [some[k : k + BATCH] for some in groups.values() for k in range(0, len(some), BATCH)]


def shown(world: World, images: Tensor) -> list[list[int]]:
    """Per picture, the numbers of the concepts that either detector sees."""
    seen = world.eyes.see(images)
    there = torch.stack([world.eyes.concept(seen, concept).any(0) for concept in CONCEPTS], 1)
    return [[k for k, each in enumerate(row) if each] for row in there.tolist()]


def _requests(name: str, raw: Sequence[Mapping[str, Any]], sets: Sets) -> list[tuple[int, int, set[int], set[int]]]:
    """Per request: policy, asked concept, erased concepts, concepts that the picture shows."""
    gone = [{CONCEPTS.index(each) for each in some} for some in sets]
    return [
        (policy, asked, gone[policy], set(shows))
        for part in raw
        for policy, asked, shows in zip(part["policy"], part["asked"], part["shows"][name], strict=True)
    ]


def _rate(hits: int, n: int) -> dict[str, Any]:
    return {"hits": hits, "n": n, "interval": [round(each, 4) for each in wilson(hits, n)]}


def _figures(name: str, raw: Sequence[Mapping[str, Any]], sets: Sets) -> dict[str, Any]:
    every = _requests(name, raw, sets)
    wanted = [(asked in shows) for _, asked, gone, shows in every if asked in gone]
    others = [(asked in shows) for _, asked, gone, shows in every if asked not in gone]
    never = [bool(shows - {asked}) for _, asked, _, shows in every]
    return {
        "pictures per second": round(len(every) / sum(part["seconds"][name] for part in raw), 3),
        "erased concept that was asked for is seen": _rate(sum(wanted), len(wanted)),
        "other concept that was asked for is seen": _rate(sum(others), len(others)),
        "concept that was not asked for is seen": _rate(sum(never), len(never)),
    }


def _service(raw: Sequence[Mapping[str, Any]], sets: Sets) -> dict[str, Any]:
    """What only the service has: leaks, delays, memory."""
    pairs = zip(*(_requests(name, raw, sets) for name in ("service", "guard")), strict=True)
    leaks = sum(bool((here & gone) - alone) for (_, _, gone, here), (_, _, _, alone) in pairs)
    apart = [each for part in raw for each in part["apart"]]
    delays = sorted(each for part in raw for each in part["delays"])
    at = {f"p{q}": delays[min(int(len(delays) * q / 100), len(delays) - 1)] for q in (50, 99)}
    return {
        "leaks": _rate(leaks, len(apart)),
        "pictures unlike those of the policy alone": _rate(sum(each > SAME for each in apart), len(apart)),
        "seconds": at,
        "MiB": [{"first": part["memory"][0], "last": part["memory"][-1], "most": max(part["memory"])} for part in raw],
    }


def _ratios(raw: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Throughput of the service over that of each alternative, per part."""
    made = {}
    for other in ("base", "guard"):
        of = [part["seconds"][other] / part["seconds"]["service"] for part in raw]
        made[other] = {"median": statistics.median(of), "min": min(of), "max": max(of)}
    return made


def _verdict(service: Mapping[str, Any], ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    leaks, waits = service["leaks"], service["seconds"]
    return [
        f"Leaks: {leaks['hits']} of {leaks['n']} pictures (95 % interval to {leaks['interval'][1]:.2%}). A leak is a "
        "picture in which a detector sees a concept that its policy erases, and does not see it in the picture that "
        "the policy draws alone.",
        f"Throughput: {ratios['base']['median']:.2f} of the base pipeline (aim: 0.9), {ratios['guard']['median']:.2f} "
        "of the guard without a server.",
        f"Delays with {CLIENTS} requests open: p50 {waits['p50']:.1f} s, p99 {waits['p99']:.1f} s.",
    ]


def minutes(n: int, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The memory of the second fifth of the time against the last one. Flat: within 2 %."""
    fifth = max(len(raw["memory"]) // 5, 1)
    early, late = (statistics.median(some) for some in (raw["memory"][fifth : 2 * fifth], raw["memory"][-fifth:]))
    figures = {"requests": raw["requests"], "answered": raw["ok"], "MiB early": early, "MiB late": late}
    figures |= {"growth": round(late / early - 1, 4), "MiB most": max(raw["memory"])}
    flat = "flat" if abs(late / early - 1) <= 0.02 else "not flat"
    words = f"Memory over {n} minutes: {early:.0f} MiB, then {late:.0f} MiB ({flat}: within 2 % or not)."
    return {"rows": [{"row": "service", "figures": figures}], "verdict": [words]}
