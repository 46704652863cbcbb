"""Pins: pictures, refusals, files, commands, names and plug-ins are what they were when the golden files were written.

The golden files are in `pins/`. They do not say what is right. They keep a restructuring from changing what users see
unnoticed. Additions pass: a new method, name, verb, option or JSON key breaks nobody.

If a pin fails and you mean the change, write that part again and read the diff:

    python tests/test_pins.py --write pictures      # or refusals, commands, names, files; all of them if you name none

Writing is a decision, not a reflex: somebody's pictures, scripts or files change. Add a line to CHANGELOG.md, under
**Numbers** if pictures move. Do not write `files` again to make a test pass: they stand for the files that people have,
and a later version has to load those. Add a second set instead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open
from tiny import ALCOHOL, CAT, PROMPTS, latents
from torch import Tensor
from typer.testing import CliRunner

import efface
from efface import CCRT, EIUP, ESD, GIE, RECE, SAFREE, SDD, SLD, UCE, Concept, Delta, NegativePrompt, registry
from efface.cli import app

PINS = Path(__file__).parent / "pins"
FILES = PINS / "files"
TOLERANCE = 1e-3  # of a tensor's norm: CPUs round differently, never that much
CLEAR = 20  # tolerances that lie at least between a pinned picture and the base model's


@functools.cache
def golden(part: str) -> dict[str, Any]:
    path = PINS / f"{part}.json"
    return dict(json.loads(path.read_text("utf-8"))["pins"]) if path.exists() else {}


def write(part: str, pins: Mapping[str, Any]) -> None:
    """One line for each pin, so that a diff shows which changed."""
    lines = ",\n".join(f"{json.dumps(name)}:{_json(pin)}" for name, pin in pins.items())
    versions = {package: version(package) for package in ("torch", "diffusers", "transformers")}
    text = f'{{"versions": {json.dumps(versions)}, "pins": {{\n{lines}\n}}}}\n'
    (PINS / f"{part}.json").write_text(text, "utf-8")
    golden.cache_clear()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def versions(part: str) -> str:
    """The packages that are not those of the pins: they may be why a tiny pipeline differs."""
    pinned = json.loads((PINS / f"{part}.json").read_text("utf-8"))["versions"]
    other = [f"{package} {v} there, {version(package)} here" for package, v in pinned.items() if v != version(package)]
    return f" Pinned with {', '.join(other)}." if other else ""


def changed(pinned: Any, found: Any, where: str = "") -> list[str]:
    """What is gone or different; what is new in a mapping is neither."""
    if isinstance(pinned, dict) and isinstance(found, dict):
        gone = [f"{where}/{key} is gone" for key in pinned if key not in found]
        return gone + [
            line for key in pinned.keys() & found for line in changed(pinned[key], found[key], f"{where}/{key}")
        ]
    if isinstance(pinned, list) and isinstance(found, list) and len(pinned) == len(found):
        pairs = enumerate(zip(pinned, found, strict=True))
        return [line for k, (old, new) in pairs for line in changed(old, new, f"{where}[{k}]")]
    return [] if pinned == found else [f"{where} was {pinned!r} and is {found!r}"]


def assert_kept(pinned: Any, found: Any, where: str) -> None:
    lines = changed(pinned, found, where)
    assert not lines, "\n".join(lines)


def projections(x: Tensor) -> list[float]:
    """The norm of a tensor, and eight sums of its elements with fixed random signs, each about as large."""
    signs = 2 * torch.randint(0, 2, (8, x.numel()), generator=torch.Generator().manual_seed(0)) - 1
    flat = x.detach().double().flatten()
    return [float(f"{value:.5g}") for value in (flat.norm(), *(signs.double() @ flat))]


def apart(pinned: Sequence[float], found: Sequence[float]) -> float:
    """The largest difference of two lists of projections, in tolerances."""
    return max(abs(a - b) for a, b in zip(pinned, found, strict=True)) / (TOLERANCE * pinned[0])


def without(pin: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared exactly."""
    return {key: value for key, value in pin.items() if key != "latents"}


def refusal(error: Exception) -> dict[str, str]:
    return {"type": type(error).__name__, "message": told(str(error))}


def told(message: str) -> str:
    """Without lists of what there is, which grow, and without what another package says of a damaged file."""
    message = re.sub(r"(Known|Choose from): .*", r"\1: ...", message.replace(str(FILES), "FILES"))
    return re.sub(r"(damaged or not a safetensors file) \(.*\)\.", r"\1 (...).", message)


# ---------------------------------------------------------------- pictures

NEUTRAL = (("a dog",), ("the red dog",), ("a red",))
FORMS: dict[str, Callable[[Any], Any]] = {
    "eiup": lambda pipe: EIUP(ALCOHOL),
    "eiup-neutral": lambda pipe: EIUP([ALCOHOL, CAT], strength=1.5, neutral=NEUTRAL),
    "eiup-separate": lambda pipe: EIUP(ALCOHOL, normalization="separate"),
    "eiup-gated": lambda pipe: EIUP(ALCOHOL, normalization="gated"),
    "gie": lambda pipe: GIE(ALCOHOL),
    "gie-official-values": lambda pipe: GIE(ALCOHOL, values="official"),
    "gie-two-trajectories": lambda pipe: GIE(ALCOHOL, trajectories=2),
    "gie-official": lambda pipe: GIE.official(ALCOHOL),
    "gie-adapter": lambda pipe: GIE(ALCOHOL, adapter=tiny.adapter_file(pipe)),
    "safree": lambda pipe: SAFREE(ALCOHOL),
    "safree-filter": lambda pipe: SAFREE(ALCOHOL, validation=(2.5, -5.0)),
    "sld": lambda pipe: SLD(ALCOHOL),
    "sld-max": lambda pipe: SLD.max(ALCOHOL),
    "negative": lambda pipe: NegativePrompt(ALCOHOL),
    "negative-6": lambda pipe: NegativePrompt(ALCOHOL, strength=6.0),
    "cat": lambda pipe: EIUP(CAT),
    "uce": lambda pipe: fitted("uce", pipe),
    "rece": lambda pipe: fitted("rece", pipe),
    "esd": lambda pipe: fitted("esd", pipe),
    "sdd": lambda pipe: fitted("sdd", pipe),
    "ccrt": lambda pipe: fitted("ccrt", pipe),
    "uce-half": lambda pipe: dataclasses.replace(fitted("uce", pipe), strength=0.5),
    "uce-rece": lambda pipe: fitted("uce", pipe) * 0.5 - fitted("rece", pipe),
}
ERASERS = [name for name in FORMS if name.startswith(("eiup", "gie", "safree", "sld", "negative"))]
ATTENTION = [name for name in ERASERS if name.startswith(("eiup", "gie"))]  # need layers that read the text alone
EVERYWHERE = [name for name in ERASERS if name != "safree-filter"]  # which acts in the first fifth of a trajectory
TOGETHER = [
    *(("eiup", "cat"), ("cat", "eiup"), ("eiup", "negative-6"), ("negative", "eiup-separate")),
    *(("sld", "eiup"), ("safree", "gie"), ("negative", "negative-6"), ("uce", "eiup")),
]
QUICK: dict[str, Any] = {"steps": 4, "lr": 1e-2, "batch": 2, "reuse": 2, "sampler_steps": 3}
EDITORS: dict[str, Any] = {
    "uce": UCE(),
    "rece": RECE(),
    "esd": ESD(**QUICK),
    "sdd": SDD(**QUICK, ema=0.5),
    "ccrt": CCRT(**QUICK, keep=2, generations=1, template="{}"),
}
ROWS = [[ALCOHOL], [CAT, ALCOHOL]]
NEGATIVES = ["a big dog", "wine"]
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "longer": {"num_inference_steps": 5},
    "window": {"num_inference_steps": 5},  # the eraser's, from 0.3 to 0.9
    "rows": {"negative_prompt": NEGATIVES},  # ROWS instead of the eraser's concepts
    "half": {},  # `handle.strength` is set to 0.5
    "midway": {"num_inference_steps": 4},  # and here to 0.25 after the second step
    "images": {"num_images_per_prompt": 2},
    "unguided": {"guidance_scale": 1.0},
    "embeddings": {},  # instead of texts
    "denoiser": {},  # called by itself, inside `efface.conditional_rows`
}
FIELDS: dict[str, dict[str, Any]] = {"window": {"window": (0.3, 0.9)}, "rows": {"concepts": (), "rows": ROWS}}


@functools.cache
def double(family: str) -> Any:
    """In float64, where masks and triggers have no edges that rounding could cross."""
    return tiny.pipeline(family).to(torch.float64)


_fits: dict[tuple[str, int], Delta] = {}


def fitted(name: str, pipe: Any) -> Delta:
    key = name, id(pipe)
    if key not in _fits:
        options = {"entities": ("dog", "moon", "pub")} if name == "ccrt" else {}
        _fits[key] = EDITORS[name].fit(pipe, [ALCOHOL], seed=3, **options)
    return _fits[key]


class Case(NamedTuple):
    """A picture: a tiny pipeline, the erasers that are on, in order, and how it is called."""

    family: str
    erasers: tuple[str, ...]
    call: str = "plain"

    @property
    def id(self) -> str:
        return f"{self.family}/{'+'.join(self.erasers) or 'base model'}/{self.call}"


def cases() -> list[Case]:
    found = [Case(family, (name,)) for family in ("sd1", "sd2", "sdxl", "bert", "pixart") for name in ERASERS]
    found += [Case(family, (name,), "rows") for family in ("sd1", "sdxl", "bert", "pixart") for name in EVERYWHERE]
    beside = [name for name in EVERYWHERE if name not in ATTENTION]
    found += [Case(family, (name,)) for family in ("sd3", "flux") for name in ERASERS if name != "gie-adapter"]
    found += [Case(family, (name,), call) for family in ("sd3", "flux") for name in beside for call in ("rows", "half")]
    found += [Case("sd35", (name,)) for name in beside] + [Case("pixart_sigma", (name,)) for name in ("eiup", "sld")]
    found += [Case(family, (name,), "window") for family in ("sd1", "sdxl") for name in ATTENTION]
    calls = ("half", "images", "unguided", "embeddings", "denoiser")
    found += [Case("sd1", (name,), call) for name in EVERYWHERE for call in calls]
    found += [Case("sdxl", (name,), "denoiser") for name in ("eiup", "gie", "sld")]
    found += [Case("flux", (name,), "unguided") for name in beside]
    found += [Case(family, (name,), "midway") for family in ("sd1", "flux") for name in ("eiup", "safree", "sld")]
    found = [case._replace(call="longer") if case.erasers == ("safree-filter",) else case for case in found]
    found += [Case(family, names, "rows") for family in ("sd1", "sdxl") for names in TOGETHER]
    found += [Case(family, ("safree", "sld"), "rows") for family in ("sd3", "flux")]
    found += [Case(family, (name,)) for family in ("sd1", "sdxl", "bert") for name in ("uce", "rece")]
    found += [Case("small", (name,)) for name in ("esd", "sdd", "ccrt", "uce-half", "uce-rece")]
    return found


CASES = {case.id: case for case in cases()}
BASES = {case.id: case for case in (case._replace(erasers=()) for case in CASES.values())}


def outcome(case: Case) -> dict[str, Any]:
    """The latents, what the handles say of them, and the table of what is on; or the refusal."""
    pipe = double(case.family)
    try:
        with contextlib.ExitStack() as on:
            handles = []
            for name in case.erasers:
                eraser = FORMS[name](pipe)
                if case.call in FIELDS and not isinstance(eraser, Delta):
                    eraser = dataclasses.replace(eraser, **FIELDS[case.call])
                handles.append(on.enter_context(eraser.apply(pipe)))
            if case.call == "half":
                for handle in handles:
                    handle.strength = 0.5
            drawn = projections(picture(pipe, case, handles))
            said: dict[str, Any] = {"record": [recorded(handle) for handle in handles]}
            if len(handles) > 1:
                said["table"] = str(efface.active(pipe))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return refusal(error)
    return {"latents": drawn, **(said if handles else {})}


def recorded(handle: Any) -> list[Any]:
    """Denoiser calls, calls for each row, those without anything to do, by reason, and edited layers."""
    assert list(handle.record) in (["calls", "rows", "exempt", "layers"], [])
    return list(handle.record.values())


def picture(pipe: Any, case: Case, handles: Sequence[Any]) -> Tensor:
    call: dict[str, Any] = {"num_inference_steps": 3, **CALLS[case.call]}
    if case.call == "denoiser":
        given = tiny.batch(case.family)
        given = {k: {n: t.double() for n, t in v.items()} if isinstance(v, dict) else v for k, v in given.items()}
        given |= {name: given[name].double() for name in ("sample", "encoder_hidden_states")}
        with efface.conditional_rows(pipe, [False, True]), torch.no_grad():
            return pipe.unet(**given).sample
    if case.call == "midway":

        def weaken(pipe: Any, step: int, time: Any, values: Any) -> Any:
            if step == 1:
                for handle in handles:
                    handle.strength = 0.25
            return values

        call["callback_on_step_end"] = weaken
    if case.call == "embeddings":
        text, negative = embeddings(case.family)
        return latents(pipe, None, prompt_embeds=text, negative_prompt_embeds=negative, **call)
    return latents(pipe, PROMPTS, **call)


@functools.cache
def embeddings(family: str) -> tuple[Tensor, Tensor]:
    """Of the prompts and of `NEGATIVES`, by a pipeline without erasers."""
    with torch.no_grad():
        found = tiny.untouched(family).encode_prompt(list(PROMPTS), "cpu", 1, True, negative_prompt=NEGATIVES)
    return found[0].double(), found[1].double()


def pictures() -> dict[str, Any]:
    return {name: outcome(case) for name, case in (BASES | CASES).items()}


@pytest.mark.thinned("long")
@pytest.mark.parametrize("name", [*BASES, *CASES])
def test_a_picture_is_the_pinned_one(name: str) -> None:
    pinned, found = golden("pictures")[name], outcome((BASES | CASES)[name])
    if "latents" not in pinned or "latents" not in found:
        return assert_kept(pinned, found, name)
    far, why = apart(pinned["latents"], found["latents"]), ""
    base = BASES_OF[name]
    if far > 1 and apart(golden("pictures")[base]["latents"], outcome(BASES[base])["latents"]) > 1:
        why = f" So does the base model's: the tiny pipeline is another.{versions('pictures')}"
    assert far <= 1, f"The picture of {name} differs by {far:.3g} tolerances.{why}"
    assert_kept(without(pinned), found, name)


BASES_OF = {name: case._replace(erasers=()).id for name, case in (BASES | CASES).items()}


def test_pinned_pictures_are_clear_of_the_base_model_and_none_is_left_over() -> None:
    """A pin of a method that does nothing would pass whatever happens to the method."""
    pins = golden("pictures")
    assert pins.keys() == (BASES | CASES).keys()
    drawn = [name for name in CASES if "latents" in pins[name]]
    unclear = {n: apart(pins[n]["latents"], pins[BASES_OF[n]]["latents"]) for n in drawn}
    assert {name: far for name, far in unclear.items() if far < CLEAR} == {}
    assert len(drawn) > 200


def test_tiny_pipelines_do_not_depend_on_the_global_random_state() -> None:
    """Nor on the order of hashes: that is another in every process, and the pins hold in all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = tiny.pipeline("sd1").to(torch.float64)
        torch.manual_seed(2)
        assert torch.equal(latents(other, PROMPTS), latents(double("sd1"), PROMPTS))


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def argv(*args: str) -> Iterator[None]:
    before, sys.argv = sys.argv, list(args)
    try:
        yield
    finally:
        sys.argv = before


def ran(*args: str) -> Any:
    """What a command prints as JSON."""
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def shape(value: Any) -> Any:
    """The keys of JSON, and the types of what is no mapping; elements of a list are taken together."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [functools.reduce(_both, map(shape, value))] if value else []
    return "null" if value is None else type(value).__name__


def _both(a: Any, b: Any) -> Any:
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: _both(a[key], b[key]) if key in a and key in b else a.get(key, b.get(key)) for key in a | b}
    if isinstance(a, str) and isinstance(b, str):
        return " or ".join(sorted({*a.split(" or "), *b.split(" or ")}))
    return a or b


@functools.cache
def exact(seed: int = 0) -> Any:
    """A small pipeline whose texts and whose weights that read them have the same bits on every machine.

    Files name their model by a hash of such weights, and a checkpoint of CCRT by one of encoded texts. Random numbers
    with a bell curve differ in the last bit between CPUs, and so does what a text encoder computes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
        pipe = tiny.stable_diffusion(tiny.tokenizer(), 16, tiny.denoiser(16, block_out_channels=(8,), **blocks))
    random = torch.Generator().manual_seed(seed)
    for name, weight in pipe.unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weight.data = torch.randint(-64, 65, weight.shape, generator=random) / 64
    table = torch.randint(-32, 33, (len(pipe.tokenizer), 16), generator=random) / 16

    def look_up(module: Any, args: Any, given: Mapping[str, Any], out: Any) -> Any:
        ids = given["input_ids"] if "input_ids" in given else args[0]
        out.last_hidden_state = table[ids] + table[ids.roll(1, -1)] / 2
        return out

    pipe.text_encoder.register_forward_hook(look_up, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def golden_delta() -> Delta:
    return Delta.load(FILES / "delta.safetensors")


ADAPTER = "adapter.safetensors"
RUN, BASE = Path("run/cat"), Path("run/base")
FEW = ("clip_score", "in_prompt_clip", "kid")  # which today are not given for as few prompts as this run has
BENCH = shlex.split(f"bench emoji --concept cat --limit 3 --batch 2 --out {RUN} --base {BASE}")
CALIBRATE = shlex.split(
    "calibrate --concept cat --strength 0.5 --strength 2 --refine 0 --n 2 --steps 8 --target 0.5 --out calibration"
)
FITS: dict[str, tuple[Any, dict[str, Any]]] = {  # a checkpoint, of a fit that was interrupted
    "esd.safetensors": (ESD(**QUICK | {"steps": 22, "train": "x-strict"}), {}),
    "sdd.safetensors": (SDD(**QUICK | {"steps": 22, "train": "x-strict"}), {}),
    "ccrt": (
        CCRT(**QUICK | {"train": "x-strict"}, keep=2, generations=1, template="{}"),
        {"entities": ("dog", "moon", "pub")},
    ),
}


def files() -> dict[str, Any]:
    """Writes the files, and says what is to be made of them."""
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir(parents=True)
    UCE(lam=1.0).fit(exact(), [ALCOHOL, CAT]).save(FILES / "delta.safetensors")
    golden_delta.cache_clear()
    shutil.copyfile(tiny.adapter_file(exact()), FILES / ADAPTER)
    for name in FITS:
        interrupt(name)
    with contextlib.chdir(FILES):
        for args in (BENCH, CALIBRATE):
            with argv("efface", *args):
                done = CliRunner().invoke(app, args)
            assert done.exit_code == 0, done.output
    for lock in FILES.rglob(".lock"):
        lock.unlink()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(shutil.copytree(FILES, Path(folder) / "files"))
        with contextlib.chdir(place):
            printed = {args[0]: shape(ran(*args, "--json")) for args in (BENCH, ("report", str(RUN)), CALIBRATE)}
        return of_files(place) | {f"{verb} --json": keys for verb, keys in printed.items()}


def fit(name: str, folder: Path) -> Delta:
    """The fit of that checkpoint, to its end."""
    editor, options = FITS[name]
    return editor.fit(exact(), [ALCOHOL], seed=3, checkpoint=folder / name, **options)


def interrupt(name: str) -> None:
    """Begins a fit, and stops it like Ctrl-C once there is a checkpoint."""
    path = FILES / name / ("1/prompts.json" if name == "ccrt" else "")

    def stop(*_: Any) -> None:
        if path.exists():
            raise KeyboardInterrupt

    hook = exact().unet.register_forward_hook(stop)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            fit(name, FILES)
            raise AssertionError(f"The fit of {name} ended before it could be interrupted.")
    finally:
        hook.remove()


def of_files(folder: Path) -> dict[str, Any]:
    """What the files in a folder, whose checkpoints are used up, say and do today."""
    pipe, delta, eraser = exact(), Delta.load(folder / "delta.safetensors"), GIE(ALCOHOL, adapter=folder / ADAPTER)
    on: dict[str, Any] = {"base model": (), "delta": (delta,), "adapter": (eraser,)}
    on["half a delta and EIUP"] = dataclasses.replace(delta, strength=0.5), EIUP(CAT)
    on |= {name: (resumed(name, folder),) for name in FITS}
    found: dict[str, Any] = {}
    for name, erasers in on.items():
        with efface.stack(pipe, *erasers):
            found[name] = {"latents": projections(latents(pipe, PROMPTS, num_inference_steps=3))}
    found["delta"] |= {"config": {k: v for k, v in delta.config().items() if k != "versions"}}
    for layout in ("diffusers", "kohya"):
        delta.export(folder / f"{layout}.lora", layout)
        found[f"delta as a LoRA for {layout}"] = shapes(folder / f"{layout}.lora")
    return found


def resumed(name: str, folder: Path) -> Delta:
    """The fit goes on from its checkpoint, and does not begin anew."""
    calls: list[int] = []
    hook = exact().unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        delta, rest = fit(name, folder), len(calls)
        calls.clear()
        fit(name, folder / "anew")
    finally:
        hook.remove()
    assert 0 < rest < 0.7 * len(calls), f"The checkpoint {name} saved {len(calls) - rest} of {len(calls)} calls."
    return delta


def shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


@pytest.mark.long
def test_deltas_adapters_and_checkpoints_of_today_still_work(tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path / "files")
    pinned, found = golden("files"), of_files(tmp_path / "files")
    far = {name: apart(pin["latents"], found[name]["latents"]) for name, pin in pinned.items() if "latents" in pin}
    assert {name: f for name, f in far.items() if f > 1} == {}
    clear = {name: apart(pinned[name]["latents"], pinned["base model"]["latents"]) for name in far}
    assert min(f for name, f in clear.items() if name != "base model") > CLEAR
    assert_kept({name: without(pin) for name, pin in pinned.items() if "--json" not in name}, found, "files")


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    """A copy of the files, in which commands are run."""
    shutil.copytree(FILES, tmp_path / "files")
    with contextlib.chdir(tmp_path / "files"):
        yield tmp_path / "files"


@pytest.mark.long
def test_a_run_of_today_is_scored_and_reported(there: Path) -> None:
    card, found = read(FILES / RUN / "card.json"), ran("report", str(RUN), "--json")
    assert found["groups"] == [{"runs": [{"label": "eiup", **card}]}]
    scores, base = efface.Run.open(RUN).scores()
    assert [(s.metric, s.n, s.protocol) for s in scores] == [
        (s["metric"], s["n"], s["protocol"]) for s in card["scores"]
    ]
    assert [s.metric for s in base] == [s.metric for s in scores] and scores[0].per_sample
    assert_kept(golden("files")["report --json"], shape(found), "report --json")
    assert Path("report.html").stat().st_size > 20_000 and read(Path("report.json")) == found
    scored = ran("score", str(RUN), "--json")
    assert_kept(golden("files")["bench --json"], shape(scored), "bench --json")
    kept = [s for s in card["scores"] if not s["metric"].startswith(FEW)]
    assert_same_scores([s for s in scored["scores"] if not s["metric"].startswith(FEW)], kept)
    few = [s for s in scored["scores"] if s["metric"].startswith(FEW)]
    assert few and all(s["value"] is None and "fewer than 10" in s["protocol"] for s in few)
    assert [s["metric"] for s in read(RUN / "scores.json")["scores"]] == [s["metric"] for s in scored["scores"]]
    removal = [s for s in card["scores"] if s["metric"].startswith("removal")]
    assert_same_scores(ran("score", str(RUN), "--metric", "removal", "--json")["scores"], removal)


@pytest.mark.long
def test_a_run_of_today_goes_on(there: Path) -> None:
    """One picture of the first batch of two is missing: the batch is drawn again, and nothing else."""
    lines = (RUN / "samples.jsonl").read_text().splitlines(keepends=True)
    (RUN / "samples.jsonl").write_text("".join(lines[::2]))
    card = ran(*BENCH, "--json")
    now = sorted((RUN / "samples.jsonl").read_text().splitlines(keepends=True), key=lambda line: json.loads(line)["k"])
    assert len(now) == 3 and [a == b for a, b in zip(now, lines, strict=True)] == [False, False, True]
    assert len(card["sessions"]) == 2
    assert_kept(golden("files")["bench --json"], shape(card), "bench --json")
    for line in lines[:2]:
        file = json.loads(line)["file"]
        before, after, base = (pixels(folder / file) for folder in (FILES / RUN, RUN, BASE))
        assert tiny.change(after, before) < 0.02 < 0.1 < tiny.change(base, before)
    assert all((BASE / f).read_bytes() == (FILES / BASE / f).read_bytes() for f in ("run.json", "samples.jsonl"))


@pytest.mark.long
def test_a_calibration_of_today_goes_on(there: Path) -> None:
    """From judgements that are there: nothing is drawn again, and the result is the same."""
    Path("calibration/calibration.json").unlink()
    found = ran(*CALIBRATE, "--json")
    for path in Path("calibration").iterdir():
        assert {**read(path), "format": None} == {**read(FILES / path), "format": None}, path.name
    assert found["strength"] == 2.0 and [point["strength"] for point in found["points"]] == [0.5, 2.0]
    assert_kept(golden("files")["calibrate --json"], shape(found), "calibrate --json")


def assert_same_scores(found: Sequence[Mapping[str, Any]], pinned: Sequence[Mapping[str, Any]]) -> None:
    assert [score["metric"] for score in found] == [score["metric"] for score in pinned]
    for new, old in zip(found, pinned, strict=True):
        for key in ("n", "unit", "higher_is_better", "protocol"):
            assert new[key] == old[key]
        for a, b in ((new, old), (new["base"], old["base"])):
            assert all(
                a[k] == (b[k] if b[k] is None else pytest.approx(b[k], abs=0.01)) for k in ("value", "low", "high")
            )


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def pixels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).double()


# ---------------------------------------------------------------- refusals


def called(eraser: Any, family: str = "sd1", **call: Any) -> Callable[[], Any]:
    """A call of the pipeline with the eraser on."""

    def draw() -> None:
        with eraser.apply(double(family)):
            latents(double(family), **{"prompt": PROMPTS, "num_inference_steps": 1, **call})

    return draw


def set_on(name: str, value: Any, removed: bool = False) -> Callable[[], Any]:
    """A handle of EIUP that is set."""

    def change() -> None:
        with EIUP(ALCOHOL).apply(double("sd1")) as handle:
            if removed:
                handle.remove()
            setattr(handle, name, value)

    return change


def denoise(eraser: Any, rows: Sequence[bool] | None) -> Callable[[], Any]:
    """The denoiser called by itself, with two rows of text."""

    def call() -> None:
        pipe = tiny.untouched("sd1")
        with eraser.apply(pipe), contextlib.ExitStack() as stack:
            if rows is not None:
                stack.enter_context(efface.conditional_rows(pipe, rows))
            pipe.unet(**tiny.batch("sd1"))

    return call


def inside_conditional_rows() -> None:
    pipe = double("sd1")
    with EIUP(ALCOHOL).apply(pipe), efface.conditional_rows(pipe, [True]):
        latents(pipe, num_inference_steps=1)


def too_late() -> None:
    """A delta that belongs on top of another."""
    with golden_delta().apply(exact()):
        second = UCE().fit(exact(), CAT)
    second.apply(exact())


def merged_twice() -> None:
    with golden_delta().apply(exact()):
        golden_delta().merge(exact())


class Nothing:
    def __repr__(self) -> str:
        return "Nothing()"


LONG = Concept("long", ("beer " * 20,))
REFUSALS: dict[str, Callable[[], Any]] = {
    **{
        f"fit {name} on {family}": functools.partial(lambda name, family: fitted(name, double(family)), name, family)
        for name in EDITORS
        for family in ("pixart", "cogview4", "sd3", "flux")
        if family == "cogview4" or name in ("uce", "rece")  # the others train there
    },
    "erase/method": lambda: efface.erase(double("sd1"), CAT, method="eipu"),
    "erase/no method": lambda: efface.erase(double("sd1"), CAT, method=3),  # type: ignore[arg-type]
    "erase/editor": lambda: efface.erase(double("sd1"), CAT, method="uce"),
    "erase/preset": lambda: efface.erase(double("sd1"), CAT, method="sld.medum"),
    "erase/field": lambda: efface.erase(double("sd1"), CAT, strenght=2.0),
    "erase/concept": lambda: efface.erase(double("sd1"), "alcohl"),
    "erase/no concepts": lambda: efface.erase(double("sd1"), []),
    "erase/no pipeline": lambda: efface.erase(Nothing(), CAT),
    "stack/class": lambda: efface.stack(double("sd1"), EIUP),  # type: ignore[arg-type]
    "stack/name": lambda: efface.stack(double("sd1"), "eiup"),  # type: ignore[arg-type]
    "stack/list": lambda: efface.stack(double("sd1"), [EIUP(CAT)]),  # type: ignore[arg-type]
    "stack/editor": lambda: efface.stack(double("sd1"), UCE()),  # type: ignore[arg-type]
    "load/no folder": lambda: efface.load("emojii"),
    "load/no name": lambda: efface.load(3),  # type: ignore[arg-type]
    "load/dtype": lambda: efface.load("emoji", dtype="half precision"),
    "concept/name": lambda: efface.concept("alcohl"),
    "concept/empty": lambda: efface.concept(" "),
    "Concept/empty": lambda: Concept(""),
    "Concept/phrase": lambda: Concept("cat", ("cat", " ")),
    "Concept/phrases": lambda: Concept("cat", "cat"),  # type: ignore[arg-type]
    "Row/id": lambda: efface.Row("a/b", "a cat", 1),
    "Row/prompt": lambda: efface.Row("a", " ", 1),
    "Row/seed": lambda: efface.Row("a", "a cat", -1),
    "Sample": lambda: efface.Sample(efface.Row("a", "a cat", 1)),
    "Score": lambda: efface.Score("", 0.0, 1, 0.0, 0.0),
    "Suite/rows": lambda: efface.Suite("mine", "1", ()),
    "Suite/twice": lambda: efface.Suite("mine", "1", (efface.Row("a", "a cat", 1),) * 2),
    "make_suite/name": lambda: efface.make_suite("emojii"),
    "make_suite/field": lambda: efface.make_suite("emoji", "cat", picture=9),
    "make_suite/seeds": lambda: efface.make_suite("emoji", "cat", first_seed=9_999),
    "detector/name": lambda: efface.detector("eye", "cat"),
    "detector/names": lambda: efface.detector("eyes", "zebra crossing"),
    "effectiveness": lambda: efface.effectiveness(["a cat"], double("sd1"), efface.detector("eyes", "cat"), n=0),
    "report/nothing": lambda: efface.write_report([], "report.html"),
    "calibrate/concept": lambda: efface.calibrate(double("sd1"), EIUP(CAT), ALCOHOL, efface.detector("eyes", "cat")),
    "calibrate/seeds": lambda: efface.calibrate(
        double("sd1"), EIUP(CAT), CAT, efface.detector("eyes", "cat"), keep_prompts=["a dog"], first_seed=9_990
    ),
    "eiup/strength": lambda: EIUP(CAT, strength=-1.0),
    "eiup/window": lambda: EIUP(CAT, window=(0.0, 1.5)),
    "eiup/form": lambda: EIUP(CAT, normalization="project"),  # type: ignore[arg-type]
    "eiup/neutral": lambda: EIUP(CAT, neutral=("a dog",)),  # type: ignore[arg-type]
    "eiup/rows": lambda: EIUP(rows="cat"),
    "eiup/phrase": called(EIUP(LONG)),
    "eiup/rows of a call": called(EIUP(rows=[[CAT], [], []])),
    "gie/values": lambda: GIE(CAT, values="code"),  # type: ignore[arg-type]
    "gie/trajectories": lambda: GIE(CAT, trajectories=3),
    "gie/adapter": lambda: GIE(CAT, adapter="absent.safetensors"),
    "gie/adapter of another model": lambda: GIE(CAT, adapter=FILES / ADAPTER).apply(exact(seed=9)),
    "gie/guidance": called(GIE(CAT, trajectories=2), guidance_rescale=0.7),
    "safree/alpha": lambda: SAFREE(CAT, alpha=-1.0),
    "safree/validation": lambda: SAFREE(CAT, validation=(0.0, 1.0)),
    "safree/prompt_2": called(SAFREE(CAT), "sdxl", prompt_2=["a dog", "a cat"]),
    "sld/warmup": lambda: SLD(CAT, warmup=2.0),
    "sld/momentum": lambda: SLD(CAT, momentum_beta=1.5),
    "sld/scale": lambda: SLD(CAT, sld_guidance_scale=float("inf")),
    "negative/phrases": lambda: NegativePrompt(Concept("long", ("beer glass " * 4,) * 4)).apply(double("sd1")),
    "uce/mode": lambda: UCE(mode="remove"),  # type: ignore[arg-type]
    "uce/attributes": lambda: UCE(mode="debias"),
    "uce/lam": lambda: UCE(lam=0.0),
    "uce/anchor": lambda: UCE().fit(exact(), Concept("cat", anchor="cat")),
    "uce/no concepts": lambda: UCE().fit(exact(), []),
    "rece/mu": lambda: RECE(mu=0.0),
    "esd/train": lambda: ESD(train="xattn"),  # type: ignore[arg-type]
    "esd/lr": lambda: ESD(lr=0.0),
    "esd/eta": lambda: ESD(eta=-2.0),
    "esd/phrase": lambda: ESD(**QUICK).fit(exact(), LONG),
    "sdd/roles": lambda: SDD(prompt_roles="script"),  # type: ignore[arg-type]
    "sdd/ema": lambda: SDD(ema=2.0),
    "ccrt/keep": lambda: CCRT(keep=1),
    "ccrt/template": lambda: CCRT(template="a photo"),
    "ccrt/entities": lambda: CCRT(**QUICK, keep=2).fit(exact(), CAT, entities=["big cat", "moon"]),
    "handle/strength": set_on("strength", -1.0),
    "handle/rows": set_on("rows", "cat"),
    "handle/window": set_on("window", (0.0, 1.0)),
    "handle/misspelt": set_on("strenght", 1.0),
    "handle/removed": set_on("strength", 1.0, removed=True),
    "conditional_rows/order": denoise(EIUP(CAT), [True, False]),
    "conditional_rows/none": denoise(EIUP(CAT), []),
    "conditional_rows/another number": denoise(EIUP(CAT), [True]),
    "conditional_rows/not given": denoise(EIUP(CAT), None),
    "conditional_rows/pipeline": inside_conditional_rows,
    "delta/empty": lambda: Delta({}, method="mine"),
    "delta/strength": lambda: dataclasses.replace(golden_delta(), strength=-1.0),
    "delta/absent": lambda: Delta.load("absent.safetensors"),
    "delta/other file": lambda: Delta.load(FILES / ADAPTER),
    "delta/another model": lambda: golden_delta().apply(exact(seed=9)),
    "delta/another architecture": lambda: golden_delta().apply(double("sdxl")),
    "delta/after": too_late,
    "delta/merge": merged_twice,
    "delta/layout": lambda: golden_delta().export("lora.safetensors", "a1111"),  # type: ignore[arg-type]
    "delta/rank": lambda: golden_delta().truncated(0),
    "run/eraser on": lambda: _run_with_eraser_on(),
    "run/no folder": lambda: efface.Run.open("absent"),
    "score/no folder": lambda: efface.score("absent"),
    "attribute": lambda: efface.eiup,
}


def _run_with_eraser_on() -> None:
    with EIUP(CAT).apply(double("sd1")), tempfile.TemporaryDirectory() as folder:
        efface.run(efface.Suite("mine", "1", (efface.Row("a", "a cat", 1),)), double("sd1"), out=f"{folder}/run")


def refused(name: str) -> dict[str, str]:
    try:
        REFUSALS[name]()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is pinned
        return refusal(error)
    return {"type": "", "message": ""}


def refusals() -> dict[str, Any]:
    return {name: refused(name) for name in REFUSALS}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_the_pinned_words(name: str) -> None:
    assert golden("refusals")[name]["type"]
    assert_kept(golden("refusals")[name], refused(name), name)


# ---------------------------------------------------------------- commands


USES: dict[str, str] = {  # in a folder that `desk` makes; what is behind # happens meanwhile
    "version": "--version",
    "no such verb": "erases",
    "list": "list",
    "list/methods": "list methods --json",
    "list/typo": "list method",
    "erase": "erase 'a red cat' --concept cat --model model --images 1 --steps 1 --out a",
    "erase/json": "erase 'a red cat' --concept cat --model model --images 2 --steps 1 --negative dog --out b --json",
    "erase/delta": "erase 'a red cat' --delta delta.safetensors --model model --images 1 --steps 1 --out c --json",
    "erase/two": "erase cat --delta delta.safetensors --method sld.strong --concept cat --model model --images 1 "
    "--steps 1 --set warmup=0 --out d --json",
    "erase/emoji": "erase 'a cat' --concept cat --concept nudity --images 1 --steps 1 --out e --json",
    "erase/interrupted": "erase 'a cat' --concept cat --model model --steps 1 --out f # KeyboardInterrupt",
    "erase/out of memory": "erase 'a cat' --concept cat --model model --steps 1 --out f # RuntimeError",
    "erase/no such option": "erase 'a cat' --concepts cat",
    "erase/no prompt": "erase",
    "erase/out of range": "erase 'a cat' --concept cat --images 0",
    "erase/empty": "erase '' --concept cat",
    "erase/nothing": "erase 'a cat'",
    "erase/concept": "erase 'a cat' --concept caat",
    "erase/method": "erase 'a cat' --concept cat --method eipu",
    "erase/preset": "erase 'a cat' --concept cat --method sld.medum",
    "erase/field": "erase 'a cat' --concept cat --set strenght=2",
    "erase/value": "erase 'a cat' --concept cat --set strength=much",
    "erase/setting": "erase 'a cat' --concept cat --set strength",
    "erase/concepts": "erase 'a cat' --concept cat --set concepts=2",
    "erase/rows": "erase 'a cat' --concept cat --set rows=[]",
    "erase/guidance": "erase 'a cat' --concept cat --method sld --guidance 1",
    "erase/seeds": "erase 'a cat' --concept cat --seed 4294967295",
    "erase/model": "erase 'a cat' --concept cat --model emojii",
    "erase/no model": "erase 'a cat' --concept cat --model run",
    "erase/damaged model": "erase 'a cat' --concept cat --model damaged",
    "erase/full": "erase 'a cat' --concept cat --out full",
    "erase/a file": "erase 'a cat' --concept cat --out full/mine.txt",
    "erase/no delta": "erase 'a cat' --delta absent.safetensors",
    "erase/delta twice": "erase 'a cat' --delta delta.safetensors --delta delta.safetensors",
    "erase/delta and fields": "erase 'a cat' --delta delta.safetensors --set strength=2",
    "erase/delta of another model": "erase 'a cat' --delta delta.safetensors --steps 1 --out g",
    "fit": "fit uce --concept cat --model model --out cat.safetensors",
    "fit/json": "fit uce --phrase cat --anchor dog --keep moon --model model --out dog.safetensors --json",
    "fit/interrupted": "fit esd --phrase cat --model model --set steps=2 --out h.safetensors # KeyboardInterrupt",
    "fit/nothing": "fit uce --out h.safetensors",
    "fit/eraser": "fit eiup --concept cat --out h.safetensors",
    "fit/field": "fit uce --concept cat --set lamb=1 --out h.safetensors",
    "fit/exists": "fit uce --concept cat --model model --out delta.safetensors",
    "fit/a folder": "fit uce --concept cat --out full",
    "delta info": "delta info delta.safetensors",
    "delta info/json": "delta info delta.safetensors --json",
    "delta info/absent": "delta info absent.safetensors",
    "delta info/damaged": "delta info damaged.safetensors",
    "delta info/adapter": "delta info adapter.safetensors",
    "delta export": "delta export delta.safetensors --out lora.safetensors",
    "delta export/json": "delta export delta.safetensors --layout kohya --rank 1 --out kohya.safetensors --json",
    "delta export/layout": "delta export delta.safetensors --layout a1111 --out x.safetensors",
    "delta export/exists": "delta export delta.safetensors --out adapter.safetensors",
    "delta merge": "delta merge delta.safetensors --model model --out merged",
    "delta merge/json": "delta merge delta.safetensors --model model --out merged-json --json",
    "delta merge/twice": "delta merge delta.safetensors delta.safetensors --model model --out x",
    "bench": "bench emoji --concept cat --limit 1 --model model --no-score --out bench/d",
    "bench/json": "bench emoji --concept cat --limit 1 --model model --no-score --out bench/b --json",
    "bench/interrupted": "bench emoji --concept cat --limit 1 --model model --no-score --out g # KeyboardInterrupt",
    "bench/out of memory": "bench emoji --concept cat --limit 1 --model model --no-score --out h # RuntimeError",
    "bench/another": "bench emoji --concept cat --limit 1 --model model --no-score --set strength=1 --out bench/a",
    "bench/suite": "bench emojii --concept cat --out x",
    "bench/nothing": "bench emoji --out x",
    "bench/option": "bench emoji --concept cat --option picture=9 --out x",
    "bench/data": "bench i2p --concept nudity --out x",
    "bench/no model": "bench i2p --concept nudity --data . --out x",
    "bench/judge": "bench emoji --concept cat --judge removl.detector=q16 --out x",
    "bench/no judge": "bench emoji --concept cat --judge removal.detector=nudenet --out x",
    "bench/full": "bench emoji --concept cat --limit 1 --model model --no-score --out full",
    "score/absent": "score nowhere",
    "score/metric": "score run/cat --metric removl",
    "score/field": "score run/cat --set removal.detecter=eyes",
    "score/unfinished": "score bench/half",
    "report": "report run/cat",
    "report/absent": "report nowhere",
    "report/name": "report run/cat --out report.pdf",
    "report/not scored": "report bench/a",
    "calibrate/concept": "calibrate --concept caat",
    "calibrate/not drawn": "calibrate --concept nudity",
    "calibrate/model": "calibrate --concept cat --model model",
    "calibrate/strength": "calibrate --concept cat --set strength=1",
    "calibrate/seeds": "calibrate --concept cat --seed 9999 --out x",
    "calibrate/another": "calibrate --concept cat --strength 0.5 --n 1 --out calibration",
}


def desk(folder: Path) -> Path:
    """A folder with what the uses are about."""
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    exact().save_pretrained(folder / "model", safe_serialization=True)
    for name, file, text in (("full", "mine.txt", "precious"), ("damaged", "model_index.json", "{}")):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    (folder / "damaged.safetensors").write_bytes((folder / "delta.safetensors").read_bytes()[:-8])
    for name in ("a", "half"):
        use(USES["bench"].replace("bench/d", f"bench/{name}"), folder)
    (folder / "bench/half/samples.jsonl").write_text("")
    return folder


@pytest.fixture(scope="module")
def uses_desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return desk(tmp_path_factory.mktemp("pins"))


def use(line: str, folder: Path) -> dict[str, Any]:
    """The exit code of a command, its error if it is ours, and the shape of its JSON."""
    command, _, meanwhile = line.partition(" # ")
    args = shlex.split(command)
    with contextlib.chdir(folder), argv("efface", *args), pytest.MonkeyPatch.context() as patch:
        if meanwhile:

            def stop(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt if meanwhile == "KeyboardInterrupt" else RuntimeError("Out of room.")

            patch.setattr(DDIMScheduler, "step", stop)
            patch.setattr(torch.optim.AdamW, "step", stop)
        done = CliRunner().invoke(app, args)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    found: dict[str, Any] = {"exit": done.exit_code}
    error = " ".join(done.stderr.partition("Error: ")[2].split())
    if done.exit_code and error:
        found["error"] = told(error)
    if not done.exit_code and "--json" in args:
        found["json"] = shape(json.loads(done.stdout))
    return found


@pytest.mark.thinned("long")
@pytest.mark.parametrize("name", USES)
def test_a_command_ends_as_pinned(name: str, uses_desk: Path) -> None:
    assert_kept(golden("commands")[name], use(USES[name], uses_desk), USES[name])


class Manual(NamedTuple):
    """What `--help` of a verb says: name to facts, and name to words, of the verb itself under ""."""

    facts: dict[str, str]
    words: dict[str, str]
    verbs: list[str]


def manual(verb: str) -> Manual:
    wide = {"COLUMNS": "500", "TERMINAL_WIDTH": "500", "NO_COLOR": "1"}  # no sentence is wrapped
    done = CliRunner().invoke(app, [*verb.split()[1:], "--help"], env=wide)
    assert done.exit_code == 0
    found, panel, about = Manual({}, {}, []), "", []
    for line in done.stdout.splitlines():
        if start := re.match(r"╭─ (\w+) ─", line):
            panel = start[1]
        elif line.startswith("│"):
            cells = re.split(r"\s{2,}", line.strip("│* \n"))
            bounds = [bound for cell in cells[1:-1] for bound in re.findall(r"\[.*<.*\]|\[.*>.*\]", cell)]
            text, *facts = re.split(r" (?=\[(?:default: .*|required)\])", cells[-1])
            found.words[cells[0]] = text
            if panel == "Commands":
                found.verbs.append(f"{verb} {cells[0]}")
            else:
                found.facts[cells[0]] = " ".join([panel.lower().removesuffix("s"), *bounds, *facts])
        elif not panel and line.strip() and "Usage:" not in line:
            about.append(line.strip())
    found.words[""] = " ".join(about)
    return found


def manuals() -> dict[str, Manual]:
    found, verbs = {}, ["efface"]
    for verb in verbs:
        found[verb] = manual(verb)
        verbs += found[verb].verbs
    return found


def commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for verb, said in manuals().items():
        found |= {f"{verb} --help": said.facts, f"{verb} --help, words": said.words}
    with tempfile.TemporaryDirectory() as place:
        folder = desk(Path(place))
        found |= {name: use(line, folder) for name, line in USES.items()}
    return found


VERBS = [name.removesuffix(" --help") for name in golden("commands") if name.endswith(" --help")]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_the_pinned_options_and_defaults(verb: str) -> None:
    assert_kept(golden("commands")[f"{verb} --help"], manual(verb).facts, verb)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_the_pinned_words(verb: str) -> None:
    assert_kept(golden("commands")[f"{verb} --help, words"], manual(verb).words, verb)


# ---------------------------------------------------------------- names

PLACES = (  # beside those of `efface`: what README, docs, examples in docstrings and messages tell users to import
    *("registry:methods", "registry:resolve", "registry:presets", "registry:about", "registry:near", "registry:split"),
    *("runs:run", "runs:score", "runs:make_suite", "runs:Run", "report:write_report", "calibration:calibrate"),
    *("calibration:Calibration", "calibration:Point", "calibration:same_picture", "api:model_hash", "api:load_delta"),
    *("core:Handles", "core:config", "core:check_pictures", "delta:forget", "delta:check_written", "delta:Factors"),
    *("intervals:Rate", "intervals:wilson", "intervals:clustered", "intervals:difference", "intervals:holm"),
    *("pictures:likeness", "pictures:to_pil", "pictures:grid", "families:family"),
    *("models.emoji:load", "models.emoji.eyes:ConceptEyes", "models.emoji.eyes:load_eyes", "__main__:main", "cli:app"),
)
OF_METHODS = ("apply", "fit", "sequence", "balance", "load", "__call__")
OPERATORS = ["add", "sub", "mul", "rmul", "neg", "enter", "exit", "iter", "len", "getitem", "str", "call"]


def signature(of: Any) -> str:
    """Without annotations, which may be spelt in other ways."""
    found = inspect.signature(of)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=found.empty))
    return re.sub(r"<function ([\w.]+) at 0x[0-9a-f]+>", r"\1", text)


def described(of: Any) -> dict[str, Any] | str:
    """A class by its public members, a function by its signature, anything else by its type."""
    if not inspect.isclass(of):
        return signature(of) if callable(of) else type(of).__name__
    found: dict[str, Any] = {}
    if not getattr(of, "_is_protocol", False):
        found["()"] = signature(of)
    ours = [each for each in of.__mro__ if each.__module__.startswith("efface")]
    names = [name for each in ours for name in (*vars(each), *inspect.get_annotations(each))]
    method = hasattr(of, "apply") or hasattr(of, "fit")
    for name in sorted(dict.fromkeys(names)):
        member = inspect.getattr_static(of, name, None)
        made = isinstance(member, classmethod)
        if name.strip("_") in OPERATORS or (
            not name.startswith("_") and (not method or of is Delta or made or name in OF_METHODS)
        ):
            called = callable(getattr(of, name, None))
            found[name] = signature(getattr(of, name)) if called else "settable" if _settable(member) else "attribute"
    return found


def _settable(member: Any) -> bool:
    return isinstance(member, property) and member.fset is not None


def names() -> dict[str, Any]:
    public = ["", *sorted(efface.__all__), *PLACES]
    methods = [
        f"{room}/{name}" for room in ("erasers", "editors", "metrics", "suites") for name in registry.methods(room)
    ]
    suites = [f"suite emoji of {concept}" for concept in ("alcohol", "weapon", "cat", "neon sign")]
    found = [*(f"efface.{name}".rstrip(".") for name in public), "entry points", "concepts", *methods, *suites]
    return {name: named(name) for name in found}


def named(name: str) -> Any:
    """What is pinned under a name."""
    if name == "efface":
        return dict.fromkeys(sorted(efface.__all__), "public")
    if name.startswith("efface."):
        place = name.removeprefix("efface.")
        return described(at(place) if ":" in place else getattr(efface, place))
    if name == "entry points":
        return {"group": registry.GROUP, "rooms": list(registry.ROOMS), "methods": list(registry.METHODS)}
    if name == "concepts":
        return {concept: list(about.phrases) for concept, about in efface.concepts().items()}
    if name.startswith("suite "):
        suite = efface.make_suite("emoji", name.partition(" of ")[2])
        facts = {fact: getattr(suite, fact) for fact in ("version", "data_hash", "source", "licence", "call")}
        return facts | {"metrics": [metric.name for metric in suite.metrics]}
    room, _, method = name.partition("/")
    return fields_of(method, room)


def at(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"efface.{module}"), name)


def fields_of(name: str, room: str) -> dict[str, Any]:
    """Fields and defaults of a method, what its presets set, and what it promises."""
    cls: Any = registry.resolve(name, room)
    found: dict[str, Any] = {"class": cls.__name__, "()": signature(cls)}
    if room in ("erasers", "editors"):
        found["config"] = core_config(cls(CAT) if room == "erasers" else cls())
        found["listed presets"] = list(registry.presets(cls))
        for preset, make in presets(cls).items():
            found[f"preset {preset}"] = core_config(make(CAT) if room == "erasers" else make())
    if room == "erasers":
        found |= {"off": dict(cls.off or {}), "touches_uncond": cls(CAT).touches_uncond}
    if room == "metrics":
        found |= {fact: getattr(cls, fact) for fact in ("name", "unit", "higher_is_better")}
    return found


def core_config(method: Any) -> dict[str, Any]:
    return dict(at("core:config")(method))


def presets(cls: Any) -> dict[str, Callable[..., Any]]:
    """The class methods that make a method with published settings."""
    named = [name for name, member in vars(cls).items() if isinstance(member, classmethod) and not name.startswith("_")]
    needed = {name: [p for p in inspect.signature(getattr(cls, name)).parameters.values()] for name in named}
    return {
        name: getattr(cls, name)
        for name, given in needed.items()
        if all(p.name == "concepts" or p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in given)
    }


@pytest.mark.parametrize("name", golden("names"))
def test_a_name_is_as_pinned(name: str) -> None:
    assert_kept(golden("names")[name], named(name), name)


def test_every_pinned_name_can_be_seen() -> None:
    assert golden("names")["efface"].keys() <= set(dir(efface))
    assert all(hasattr(efface, name) for name in golden("names")["efface"])


# ---------------------------------------------------------------- plug-ins

PLUG_INS = {
    "pins_dim": """
        from dataclasses import dataclass
        from efface import Handle

        @dataclass(frozen=True)
        class Dim:
            concepts: tuple = ()
            strength: float = 0.5
            off = {"strength": 0.0}
            touches_uncond = True

            def apply(self, pipe):
                on = [self]
                dim = pipe.unet.register_forward_hook(lambda module, args, out: (out[0] * (1 - on[0].strength),))
                return Handle(self, lambda eraser: on.__setitem__(0, eraser), dim.remove)

            @classmethod
            def dark(cls, concepts, **fields):
                return cls(concepts, 0.9, **fields)
        """,
    "pins_shift": """
        from dataclasses import dataclass
        from efface import Delta

        @dataclass(frozen=True)
        class Shift:
            by: float = 0.5

            def fit(self, pipe, concepts, *, seed=0):
                name = next(n for n, _ in pipe.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
                change = pipe.unet.get_parameter(name).detach() * self.by
                return Delta.fitted(self, pipe, {f"unet.{name}": change}, concepts, seed=seed)
        """,
    "pins_red": """
        from dataclasses import dataclass
        from efface import Score

        @dataclass(frozen=True)
        class Red:
            name = "pins_red"
            unit = "share"
            higher_is_better = None
            least: float = 0.5

            def __call__(self, samples, base=None):
                seen = {s.row.id: float(s.image()[0].mean() > self.least) for s in samples}
                share = sum(seen.values()) / len(seen)
                return [Score("pins_red", share, len(seen), 0.0, 1.0, protocol="mean red", per_sample=seen)]
        """,
    "pins_moons": """
        from dataclasses import dataclass
        from efface import Row, Suite, registry

        @dataclass(frozen=True)
        class Moons:
            pictures: int = 2

            def load(self, concepts=(), data=None, limit=None):
                rows = [Row(f"moon-{k}", "a big moon", 1_000_000 + k, concept="moon") for k in range(self.pictures)]
                metrics = (registry.resolve("pins_red", "metrics")(),)
                call = {"num_inference_steps": 1, "guidance_scale": 7.5}
                return Suite("pins_moons", "1", tuple(rows[:limit]), call=call, metrics=metrics)
        """,
}
ENTRY_POINTS = """[efface.methods]
erasers.pins_dim = pins_plug_in.pins_dim:Dim
editors.pins_shift = pins_plug_in.pins_shift:Shift
metrics.pins_red = pins_plug_in.pins_red:Red
suites.pins_moons = pins_plug_in.pins_moons:Moons
"""


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another distribution, found by its entry points as an installed one is."""
    (tmp_path / "pins_plug_in").mkdir()
    for name, source in PLUG_INS.items():
        (tmp_path / "pins_plug_in" / f"{name}.py").write_text(inspect.cleandoc(source))
    (tmp_path / "pins_plug_in-1.dist-info").mkdir()
    (tmp_path / "pins_plug_in-1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: pins-plug-in\nVersion: 1\n"
    )
    (tmp_path / "pins_plug_in-1.dist-info/entry_points.txt").write_text(ENTRY_POINTS)
    exact().save_pretrained(tmp_path / "model", safe_serialization=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "pins_plug_in"]:
        del sys.modules[name]


@pytest.mark.long
def test_plug_ins_are_found_and_listed(plug_ins: Path) -> None:
    for room, name in (("erasers", "dim"), ("editors", "shift"), ("metrics", "red"), ("suites", "moons")):
        assert registry.methods(room)[f"pins_{name}"] == room
        assert registry.resolve(f"pins_{name}", room).__name__ == name.title()
    listed = ran("list", "--json")
    assert {"pins_dim", "pins_shift"} <= listed["methods"].keys()
    assert listed["metrics"]["pins_red"] == "a plugin, pins_plug_in.pins_red:Red" and "pins_moons" in listed["suites"]


def test_a_plug_in_eraser_acts_like_one_of_ours(plug_ins: Path) -> None:
    pipe = exact()
    before = latents(pipe, num_inference_steps=2)
    with efface.erase(pipe, "cat", method="pins_dim", strength=0.25) as handle:
        weak = latents(pipe, num_inference_steps=2)
        handle.strength = 0.5
        assert handle.config() == {"method": "pins_dim", "concepts": "cat", "strength": 0.5}
        assert tiny.change(latents(pipe, num_inference_steps=2), weak) > 0.05 < tiny.change(weak, before)
        with EIUP(CAT).apply(pipe):
            assert tiny.change(latents(pipe, num_inference_steps=2), weak) > 0.05
    assert torch.equal(latents(pipe, num_inference_steps=2), before)
    with efface.erase(pipe, CAT, method="pins_dim.dark") as handle:
        assert handle.strength == 0.9
    with pytest.raises(ValueError, match=r"pins_dim has no field 'strenght'. Did you mean 'strength'\?"):
        efface.erase(pipe, CAT, method="pins_dim", strenght=1.0)


def test_a_plug_in_editor_makes_deltas(plug_ins: Path) -> None:
    made = ran("fit", "pins_shift", "--concept", "cat", "--set", "by=0.25", "--model", "model", "--out", "d", "--json")
    assert made["method"] == "pins_shift" and made["fields"] == {"by": 0.25}
    before = latents(exact(), num_inference_steps=2)
    with Delta.load("d").apply(exact()) as handle:
        assert handle.config()["hash"] == made["hash"]
        assert tiny.change(latents(exact(), num_inference_steps=2), before) > 0.01


def test_plug_ins_make_a_run_by_command(plug_ins: Path) -> None:
    erased = ran(
        "erase", "cat", "--method", "pins_dim", "--concept", "cat", "--model", "model", "--steps", "1", "--json"
    )
    assert erased["eraser"]["method"] == "pins_dim" and erased["complete"]
    made = ("bench", "pins_moons", "--method", "pins_dim", "--concept", "cat", "--model", "model", "--out", "runs/a")
    card = ran(*made, "--option", "pictures=3", "--json")
    assert card["suite"]["name"] == "pins_moons" and card["rows"]["n"] == 3
    assert [score["metric"] for score in card["scores"]] == ["pins_red"] and card["erasers"][0]["method"] == "pins_dim"
    scored = ran("score", "runs/a", "--set", "pins_red.least=0", "--json")
    assert scored["scores"][0]["value"] == 1.0 == scored["scores"][0]["base"]["value"]
    assert efface.Run.open("runs/a").base is not None
    ran("report", "runs/a", "--out", "page.html", "--json")


def test_plug_ins_make_a_run_in_python(plug_ins: Path) -> None:
    erasers: list[Any] = [registry.resolve("pins_dim", "erasers")([CAT]), EIUP(CAT)]
    suite = efface.make_suite("pins_moons", "cat", limit=1)
    run = efface.run(suite, exact(), eraser=erasers, out="run", base="base")
    assert run.complete and [each["method"] for each in run.record["erasers"]] == ["pins_dim", "eiup"]
    assert [score.metric for score in efface.score("run")] == ["pins_red"]


def test_a_detector_of_ones_own_is_given_as_an_object(plug_ins: Path) -> None:
    """There are no entry points for detectors."""

    class Bright:
        name = "bright"

        def __init__(self, names: tuple[str, ...]) -> None:
            self.names = names

        def __call__(self, images: Tensor) -> Tensor:
            return (images.mean((1, 2, 3)) > 0.5)[None]

    assert efface.detector(Bright, "cat").names == ("cat",)  # type: ignore[attr-defined]
    rows = [efface.Row(f"cat-{k}", "a cat", k, concept="cat") for k in range(2)]
    base = [efface.Sample(row, pixels=torch.full((3, 8, 8), 0.9)) for row in rows]
    dark = [efface.Sample(row, pixels=torch.full((3, 8, 8), 0.1 + 0.8 * k)) for k, row in enumerate(rows)]
    absolute, relative, *_ = registry.resolve("removal", "metrics")(detector=Bright, by=())(dark, base)
    assert (absolute.value, relative.value, absolute.protocol) == (0.5, 0.5, "bright")


# ---------------------------------------------------------------- writing them

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "files": files,
    "pictures": pictures,
    "refusals": refusals,
    "commands": commands,
    "names": names,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pins today's behaviour. This is a decision: see the top of this file."
    )
    parser.add_argument(
        "--write", nargs="*", choices=PARTS, required=True, help="Parts to write; all if none is named."
    )
    asked = parser.parse_args().write
    torch.set_num_threads(1)
    PINS.mkdir(exist_ok=True)
    for part in [part for part in PARTS if part in asked or not asked]:
        write(part, PARTS[part]())
        print(f"{PINS / part}.json")


if __name__ == "__main__":
    main()
