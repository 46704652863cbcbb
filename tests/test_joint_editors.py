"""Editors of weights on transformers (SD 3/3.5, FLUX.1, PixArt, Sana), and their LoRA files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders import single_file_utils
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file
from tiny import CAT, change, latents
from tiny.flux import flux
from tiny.pixart import pixart
from torch import Generator, Tensor

from efface import CCRT, ESD, RECE, SDD, UCE, Concept, Delta
from efface._condition import call_settings
from efface._text import encode
from efface.delta import Factors, dense
from efface.editors._denoiser import Denoiser, mse, trained
from efface.families import family as facts

FAMILIES = ("sd3", "flux")
each_family = pytest.mark.parametrize("family", FAMILIES)
SCHEDULERS: tuple[dict[str, Any], ...] = (
    {},
    {"use_dynamic_shifting": True, "shift": 1.0},
    {"use_karras_sigmas": True},
)
QUICK: dict[str, Any] = {"batch": 1, "reuse": 2, "sampler_steps": 3}
SEED = 1_000_000


def pipeline(family: str) -> Any:
    """Whose default size is that of the tests."""
    pipe = tiny.pipeline(family)
    pipe.default_sample_size = 8
    return pipe


def names(pipe: Any) -> set[str]:
    return {name for name, _ in pipe.transformer.named_parameters()}


# ---------------------------------------------------------------- ESD


def flat(call: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments, with those in its dictionary, which a tiny PixArt leaves empty."""
    given = {**call, **call.get("added_cond_kwargs", {})}
    return {name: value for name, value in given.items() if name != "added_cond_kwargs" and value is not None}


def drawn(family: str, pipe: Any, guidance: float, steps: int) -> list[dict[str, Any]]:
    """The denoiser's inputs and outputs in a pipeline call with guidance."""
    seen: list[dict[str, Any]] = []
    watch = pipe.transformer.register_forward_hook(
        lambda _, args, given, out: seen.append(
            flat({**dict(zip(["hidden_states"], args, strict=False)), **given, "out": out[0]})
        ),
        with_kwargs=True,
    )
    scale = {"guidance_scale": guidance}
    if family == "flux":
        scale = {"true_cfg_scale": guidance, "guidance_scale": 1.0, "negative_prompt": ""}
    seed = Generator().manual_seed(SEED)
    with tiny.of_its_size(pipe):
        pipe("a cat", num_inference_steps=steps, generator=seed, output_type="latent", **scale)
    watch.remove()
    return seen


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        *((family, scheduler) for family in FAMILIES for scheduler in SCHEDULERS),
        *((family, {}) for family in ("pixart", "pixart_sigma", "sana", "sana15")),
    ],
)
def test_points_are_what_the_denoiser_sees_in_a_call_of_the_pipeline(family: str, scheduler: dict[str, Any]) -> None:
    """Latents, times, texts, pooled texts, positions and guidance; and its velocity there."""
    pipe, steps, guidance = pipeline(family), 4, 3.0
    if scheduler:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    if family == "sana15":
        pipe.transformer.register_to_config(timestep_scale=0.5)
    seen = drawn(family, pipe, guidance, steps)
    conditional = seen[::2] if family == "flux" else seen
    with tiny.of_its_size(pipe):
        net = Denoiser(pipe, ["beer", "a cat"], "x", steps)
    points = net.trajectory(
        torch.tensor([2]), torch.arange(steps)[:, None], None, guidance, Generator().manual_seed(SEED), keep=True
    )
    assert len(conditional) == len(points) == steps
    for k, call in enumerate(conditional):
        _, ours = net.condition.facts.training_call(
            points.x[k : k + 1], points.t[k], net.condition.at(torch.tensor([2]))
        )
        ours = flat(ours)
        want = {name: call[name] if family == "flux" else call[name][1:] for name in ours}
        for name, value in ours.items():
            assert value.shape == want[name].shape and torch.allclose(value, want[name], atol=1e-5), name
        assert change(net.condition.facts.training_output(call["out"][-1:], points.x[:1]), points.own[k : k + 1]) < 1e-4
    null = seen[1]["encoder_hidden_states"] if family == "flux" else seen[0]["encoder_hidden_states"][:1]
    assert torch.allclose(net.condition.at(torch.tensor([0]))["encoder_hidden_states"], null, atol=1e-6)
    assert change(points.x[-1:], points.x[:1]) > 0.1


@pytest.mark.long
def test_pixart_is_told_its_size_and_sana_its_instruction() -> None:
    """As a call tells them; `encode_prompt` alone leaves the instruction out."""
    pipe = pixart(size=128)
    (call,) = drawn("pixart", pipe, 3.0, 1)
    with tiny.of_its_size(pipe):
        ours = flat(Denoiser(pipe, ["a cat"], "x", 1).condition.at(torch.tensor([1])))
    assert {"resolution", "aspect_ratio"} < ours.keys()
    assert all(torch.equal(value, call[name][1:]) for name, value in ours.items())
    assert "complex_human_instruction" in call_settings(tiny.untouched("sana"))


@pytest.mark.parametrize("family", [*FAMILIES, "pixart", "sana"])
def test_esd_starts_at_one_plus_eta_squared_times_the_gap_and_learns(family: str) -> None:
    """In velocities, or PixArt's noise; the gap is that of the pipeline. At fixed points the loss falls by half."""
    pipe = pipeline(family)
    seen = drawn(family, pipe, 3.0, 3)
    outs = [(b["out"], a["out"]) for a, b in zip(seen[::2], seen[1::2], strict=True)] if family == "flux" else [
        (call["out"][:1], call["out"][1:]) for call in seen
    ]  # fmt: skip
    null, concept = (torch.cat(each)[:, : 4 if family == "pixart" else None] for each in zip(*outs, strict=True))
    with tiny.of_its_size(pipe):
        net = Denoiser(pipe, ["a cat"], "x", 3, biases=False)
    rng = Generator().manual_seed(SEED)
    points = net.trajectory(torch.tensor([1]), torch.arange(3)[:, None], None, 3.0, rng)
    editor, student = ESD(eta=2.0), net.student()
    first = editor.loss(net, student, points)
    assert float(mse(concept, null)) > 1e-4
    assert float(first.detach()) == pytest.approx(9 * float(mse(concept, null)), rel=1e-3)
    adam = torch.optim.Adam(student.values(), lr=5e-2)
    for _ in range(10):
        adam.zero_grad()
        loss = editor.loss(net, student, points)
        loss.backward()
        adam.step()
    assert float(loss.detach()) < 0.5 * float(first.detach())


@pytest.mark.parametrize("family", ["pixart", "sana"])
def test_modes_with_cross_attention_say_what_they_train(family: str) -> None:
    pipe = tiny.untouched(family)
    modes = {mode: set(trained(pipe.transformer, mode, facts(pipe).outer_layers)) for mode in ("x", "u", "self")}
    around = {name for name in names(pipe) if not name.startswith("transformer_blocks.")}
    assert modes["x"] == {name for name in names(pipe) if ".attn2." in name} != set()
    assert modes["self"] == {name for name in names(pipe) if ".attn1." in name} != set()
    assert modes["u"] == names(pipe) - modes["x"] - around
    lora = set(trained(pipe.transformer, "u", facts(pipe).outer_layers, biases=False))
    no_layer = {name for name in names(pipe) if name.endswith((".conv_depth.weight", ".scale_shift_table"))}
    assert lora == {name for name in modes["u"] - no_layer if name.endswith(".weight")} and no_layer
    with pytest.raises(ValueError, match="`train='joint'` finds no parameters"):
        trained(pipe.transformer, "joint")


def test_modes_say_what_they_train() -> None:
    for family in ("sd3", "sd35", "flux"):
        pipe = tiny.untouched(family)
        known, found = facts(pipe), pipe.transformer
        layers = tuple(known.joint_layers(found))
        outer = known.outer_layers
        modes = {mode: set(trained(found, mode, outer, layers)) for mode in ("x", "x-strict", "joint", "u", "full")}
        added = {name for name in names(pipe) if ".add_" in name}
        assert modes["x"] == added != set()
        assert modes["x-strict"] == {n for n in added if n.endswith((".add_k_proj.weight", ".add_v_proj.weight"))}
        shared = {
            n for n in names(pipe) if ".attn.to_" in n and not n.split(".attn.")[1].startswith(("to_out", "to_add"))
        }
        assert modes["joint"] == added | shared and any(n.startswith("single") for n in shared) == (family == "flux")
        around = {name for name in names(pipe) if "transformer_blocks" not in name}
        assert modes["u"] == names(pipe) - added - around and modes["full"] == names(pipe)
        if family == "sd35":
            alone = {name for name in names(pipe) if ".attn2." in name}
            assert alone and set(trained(found, "self", outer, layers)) == alone
        else:
            with pytest.raises(ValueError, match="`train='self'` finds no parameters"):
                trained(found, "self", outer, layers)


@pytest.mark.parametrize(
    ("family", "editor"),
    [
        ("sd3", ESD(train="x-strict", steps=2, lr=1e-2, **QUICK)),
        ("sd35", SDD(train="joint", steps=2, lr=1e-2, **QUICK)),
        ("flux", ESD(steps=2, lr=1e-2, **QUICK)),
        ("pixart", SDD(steps=2, lr=1e-2, **QUICK)),
        ("sana", ESD(train="u", steps=2, lr=1e-2, **QUICK)),
        pytest.param(
            "flux", CCRT(train="joint", steps=1, lr=1e-2, keep=2, generations=0, **QUICK), marks=pytest.mark.slow
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else f"{type(each).__name__} {each.train}",
)
def test_a_fit_changes_its_weights_alone_and_its_lora_draws_the_same(family: str, editor: Any, tmp_path: Path) -> None:
    """Loaded by the pipeline's own `load_lora_weights`."""
    pipe, other = pipeline(family), pipeline(family)
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    options = {"entities": ("dog", "moon", "pub", "night")} if isinstance(editor, CCRT) else {}
    with tiny.of_its_size(pipe):
        delta = editor.fit(pipe, CAT, **options)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.transformer.state_dict().items())
    joint = tuple(facts(pipe).joint_layers(pipe.transformer))
    may = trained(pipe.transformer, editor.train, facts(pipe).outer_layers, joint, biases=False)
    assert {f"transformer.{name}" for name in may} == delta.weights.keys()
    base = latents(pipe)
    with delta.apply(pipe):
        want = latents(pipe)
    assert torch.equal(latents(pipe), base) and change(want, base) > 1e-3
    assert delta.export(tmp_path / "lora.safetensors") < 1e-5
    if family != "pixart":  # for which diffusers loads none
        other.load_lora_weights(tmp_path / "lora.safetensors")
        assert change(latents(other), want) < 1e-4


def test_what_cannot_be_trained_is_refused() -> None:
    with torch.random.fork_rng():
        schnell = flux(guidance_embeds=False)
    schnell.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="distilled to few steps. Use a base model"):
        ESD().fit(schnell, CAT)
    sprint = tiny.pipeline("sana")
    sprint.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match="distilled to few steps. Use a base model"):
        ESD().fit(sprint, CAT)
    pipe = pipeline("flux")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"Call `pipe.transformer.unfuse_qkv_projections\(\)` first"):
        noise(pipe, lambda name: name.endswith("add_k_proj.weight"))
    with pytest.raises(ValueError, match="ESD needs .* or a flow-matching denoiser .*, but this Chroma"):
        ESD().fit(tiny.untouched("chroma"), CAT)


# ---------------------------------------------------------------- UCE


@torch.no_grad()
def predicted(pipe: Any, text: Tensor, pooled: Tensor | None) -> Tensor:
    """The denoiser's first prediction with this text instead of the prompt's."""

    def other(_: Any, args: Any, given: dict[str, Any]) -> Any:
        rows = given["encoder_hidden_states"].shape[0]
        more = {"encoder_hidden_states": text.expand(rows, -1, -1)}
        if pooled is not None:
            more["pooled_projections"] = pooled.expand(rows, -1)
        return args, given | more

    seen: list[Tensor] = []
    watches = [
        pipe.transformer.register_forward_pre_hook(other, with_kwargs=True),
        pipe.transformer.register_forward_hook(lambda _, args, out: seen.append(out[0])),
    ]
    latents(pipe, num_inference_steps=1)
    for watch in watches:
        watch.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["sd3", "flux", "chroma", "flux2"])
def test_the_edited_model_reads_c_as_the_base_model_reads_t_c(family: str) -> None:
    """In all layers, and the bias once; with the pooled text, where there is one."""
    pipe = tiny.pipeline(family).to(torch.float64)
    editor, concept = UCE(weights="input", lam=1e-3), Concept("cat", anchor="dog")
    delta = editor.fit(pipe, concept)
    known = facts(pipe)
    assert delta.weights.keys() == {f"transformer.{n}.weight" for n in (*known.text_inputs, *known.pooled_inputs)}
    encoded = encode(pipe, ["cat", "dog"], max_sequence_length=40 if family == "flux2" else 24)
    left, right, _ = editor.transform(pipe, [concept])
    moved = encoded.text + (encoded.text @ right.T) @ left.T
    pooled = encoded.pooled
    if pooled is not None:
        change_, _ = editor._pooled(pipe, [concept])
        weight = pipe.transformer.time_text_embed.text_embedder.linear_1.weight
        step_ = torch.linalg.lstsq(weight, dense(next(iter(change_.values()))).double()).solution
        pooled = pooled + pooled @ step_.T
    for k in range(2):
        at = slice(k, k + 1)
        want = predicted(pipe, moved[at], None if pooled is None else pooled[at])
        plain = predicted(pipe, encoded.text[at], None if encoded.pooled is None else encoded.pooled[at])
        with delta.apply(pipe):
            got = predicted(pipe, encoded.text[at], None if encoded.pooled is None else encoded.pooled[at])
        assert change(got, want) < 1e-5
        assert change(want, plain) > (1e-2 if k == 0 else 0)


@each_family
def test_the_layers_read_the_concept_as_its_anchor_and_preserved_texts_as_before(family: str) -> None:
    """The pooled vector; and the last token, where one encoder makes the text. The bias counts once."""
    pipe = tiny.pipeline(family)
    encoded, texts = encode(pipe, ["cat", "dog", "moon"]), ("cat", "dog", "moon")
    tokens = {"flux": "last"}.get(family)
    keep = {"tokens": tokens, "preserve": ("moon",), "lam": 1e-6, "preserve_scale": 1.0}
    embedder = pipe.transformer.context_embedder, pipe.transformer.time_text_embed.text_embedder.linear_1
    last = torch.stack([encoded.text[k, own.stop - 1] for k, own in enumerate(encoded.own)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SD 3's text has more columns than features here
        delta = UCE(weights="input", **keep).fit(pipe, Concept("cat", anchor="dog"))  # type: ignore[arg-type]
    assert delta.info["pooled residual"] < 1e-3 and len(texts) == len(last)
    for k, (layer, rows) in enumerate(zip(embedder, (last, encoded.pooled), strict=True)):
        if k == 0 and tokens is None:
            continue
        with torch.no_grad():
            cat, dog, moon = layer(rows)
            with delta.apply(pipe):
                edited = layer(rows)
        assert change(edited[0], dog) < 1e-3 < 0.1 < change(cat, dog)
        assert change(edited[2], moon) < 1e-3


def test_where_a_closed_form_means_nothing_it_is_refused() -> None:
    pipe = tiny.untouched("sd3")
    with pytest.raises(ValueError, match="UCE needs weights that read the encoded text, but this StableDiffusion3"):
        UCE().fit(pipe, CAT)
    with pytest.raises(ValueError, match="RECE needs weights that read the encoded text, but this StableDiffusion3"):
        RECE().fit(pipe, CAT)
    with pytest.raises(ValueError, match='with `weights="input"` needs an input layer .*, but this StableDiffusionP'):
        UCE(weights="input").fit(tiny.untouched("sd1"), CAT)
    with pytest.raises(
        ValueError, match="tokens 'all' on SD 3/3.5, whose text has the columns of 2 encoders, got 'last'"
    ):
        UCE(weights="input", tokens="last").fit(pipe, CAT)
    with pytest.raises(ValueError, match="mode 'erase' or 'moderate' with `weights=\"input\"`, got 'debias'"):
        UCE(weights="input", mode="debias", attributes=(("red", 0.1), ("big", -0.1)))
    with pytest.raises(ValueError, match="`weights` to be one of"):
        UCE(weights="output")  # type: ignore[arg-type]


# ---------------------------------------------------------------- LoRA files


def noise(pipe: Any, keep: Callable[[str], bool], ranks: int = 4) -> Delta:
    """Random changes of these weights, each of another rank than its neighbour."""
    random, made = Generator().manual_seed(SEED), dict[str, Factors]()
    for name, value in pipe.transformer.named_parameters():
        if keep(name) and value.ndim == 2:
            r = 1 + 5 * len(made) % ranks
            b, a = torch.randn(len(value), r, generator=random), torch.randn(r, value.shape[1], generator=random)
            made[f"transformer.{name}"] = Factors(0.1 * b, 0.1 * a)
    return replace(Delta.fitted(UCE(weights="input"), pipe, made, "cat"), strength=0.7)


def as_loaded(transformer: Any) -> dict[str, Tensor]:
    """What the one LoRA on a transformer adds to its weights."""
    layers = {name: m for name, m in transformer.named_modules() if hasattr(m, "lora_A")}
    return {f"transformer.{name}.weight": m.get_delta_weight(next(iter(m.lora_A))) for name, m in layers.items()}


def check_loaded(delta: Delta, got: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert delta.weights.keys() <= got.keys()
    for name, value in got.items():
        if name in delta.weights:
            assert change(value, delta.strength * dense(delta.weights[name])) < tolerance, name
        else:
            assert not value.any(), name


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
def test_diffusers_loads_a_change_of_every_matrix(family: str, ranks: int, tmp_path: Path) -> None:
    """Also of the layers around the blocks, whose names end those of layers in the blocks (`proj_out`)."""
    pipe, other = tiny.pipeline(family), tiny.pipeline(family)
    delta = noise(pipe, lambda name: True, ranks)
    assert delta.export(tmp_path / "lora.safetensors") < 1e-5
    other.load_lora_weights(tmp_path / "lora.safetensors")
    check_loaded(delta, as_loaded(other.transformer))
    if ranks == 1:
        with delta.apply(pipe):
            want = latents(pipe)
        assert change(latents(other), want) < 1e-3 < change(latents(pipe), want)


class Published(dict[str, Tensor]):
    """A checkpoint of zeros, but for what is given, that notes what is read of it."""

    def __init__(self, given: dict[str, Tensor], rows: Callable[[str], int] = lambda name: 12) -> None:
        super().__init__(given)
        self.read: list[str] = []
        self.rows = rows

    def pop(self, name: str, *default: Any) -> Tensor:  # type: ignore[override]
        self.read.append(name)
        return super().pop(name) if name in self else torch.zeros(self.rows(name), 1)


def merged(file: Path, known: list[str]) -> dict[str, Tensor]:
    """What ComfyUI adds to the weights of a published checkpoint: up down alpha / rank, at "lora_unet_" and the name
    with underscores."""
    tensors = load_file(file)
    keys = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in known}
    made = {}
    for key in {name.partition(".")[0] for name in tensors}:
        up, down = (tensors[f"{key}.lora_{way}.weight"].float() for way in ("up", "down"))
        made[keys[key]] = up @ down * float(tensors[f"{key}.alpha"]) / len(down)
    return made


@pytest.mark.parametrize("family", ["sd3", "sd35"])
def test_kohyas_names_of_sd3_are_those_of_the_published_checkpoint(family: str, tmp_path: Path) -> None:
    """diffusers' own conversion of such a checkpoint says what it reads, and gives the change."""
    pipe, file = tiny.untouched(family), tmp_path / "lora.safetensors"
    delta = noise(pipe, lambda name: True)
    assert delta.export(file, "kohya", dtype=torch.float32) < 1e-5
    convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    blocks = {f"joint_blocks.{k}.x": torch.zeros(1) for k in range(2)}
    dual = {"joint_blocks.0.x_block.attn2.qkv.weight": torch.zeros(3, 1)} if family == "sd35" else {}
    first = Published(blocks | dual | {"context_embedder.weight": torch.zeros(16, 1)})
    convert(first)
    given = blocks | dual | merged(file, first.read)
    got = {f"transformer.{name}": value for name, value in convert(Published(given)).items()}
    check_loaded(delta, {name: value for name, value in got.items() if name.endswith(".weight")})


def test_kohyas_names_of_flux_are_read_by_diffusers(tmp_path: Path) -> None:
    pipe, other, file = tiny.pipeline("flux"), tiny.pipeline("flux"), tmp_path / "lora.safetensors"
    delta = noise(pipe, lambda name: name.startswith("transformer_blocks"))
    assert delta.export(file, "kohya", dtype=torch.float32) < 1e-5
    other.load_lora_weights(file)
    check_loaded(delta, as_loaded(other.transformer))
    half = noise(pipe, lambda name: name.endswith(("add_v_proj.weight", "add_k_proj.weight")))
    assert 1e-5 < half.export(file, "kohya") < 2e-3
    assert {name.partition(".")[0] for name in load_file(file)} == {"lora_unet_double_blocks_0_txt_attn_qkv"}
    with pytest.raises(ValueError, match=r"got 'transformer.context_embedder.weight' of Flux.* Export with `layout`"):
        noise(pipe, lambda name: name.startswith("context_embedder")).export(file, "kohya")
    unknown = replace(half, info={})
    with pytest.raises(
        ValueError, match="a transformer that the delta does not name. Export with `layout` 'diffusers'"
    ):
        unknown.export(file, "kohya")
    both = half + noise(pipe, lambda name: name.endswith("to_q.weight")) * 2
    assert both.export(file, "kohya", dtype=torch.float32) < 1e-5


def test_flux_single_blocks_have_one_change_at_the_published_width(tmp_path: Path) -> None:
    """The conversion of diffusers splits it at 3,072 rows; at the tests' width the rows are counted out."""
    random, file = Generator().manual_seed(SEED), tmp_path / "lora.safetensors"
    at = "transformer.single_transformer_blocks.0."
    shapes = {f"{at}attn.to_v.weight": (3072, 2), f"{at}attn.to_q.weight": (3072, 1)}
    made = {
        name: Factors(torch.randn(out, r, generator=random), torch.randn(r, 3072, generator=random))
        for name, (out, r) in shapes.items()
    }
    delta = Delta(made, method="noise", info={"denoiser": "FluxTransformer2DModel"})
    assert delta.export(file, "kohya", dtype=torch.float32) < 1e-5
    tensors = _convert_kohya_flux_lora_to_diffusers(load_file(file))
    for name, want in made.items():
        b, a = (tensors[f"{name.removesuffix('.weight')}.lora_{each}.weight"] for each in "BA")
        probe = torch.randn(3072, 3, generator=random)
        assert change(b @ (a @ probe), want.B @ (want.A @ probe)) < 1e-4
    assert not tensors[f"{at}attn.to_k.lora_B.weight"].any() and not tensors[f"{at}proj_mlp.lora_B.weight"].any()
    pipe = tiny.untouched("flux")
    width = pipe.transformer.single_transformer_blocks[0].proj_mlp.weight.shape[1]
    small = noise(pipe, lambda name: name.startswith("single") and ("proj_mlp" in name or ".attn.to_" in name))
    small.export(file, "kohya", dtype=torch.float32)
    (whole,) = merged(file, ["single_blocks.0.linear1.weight"]).values()
    parts = whole.split([width, width, width, 4 * width])
    for part, name in zip(parts, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), strict=True):
        want = small.strength * dense(small.weights[f"{at}{name}.weight"])
        assert change(part, want) < 1e-5
