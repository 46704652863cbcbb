"""What diffusers' code says of a pipeline: its parts, what `encode_prompt` returns, what the denoiser takes."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass
from types import NoneType
from typing import Any

from .. import checks

WIDTHS = (
    *("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim", "cap_feat_dim", "context_in_dim"),
    *("text_hidden_size", "cross_attention_dim"),
)
"""Names that diffusers gives the width of a denoiser's text. Where several are there, the first is projected."""
TEXT, STATES = 24, 16
SMALL = {
    **dict.fromkeys(("in_channels", "out_channels"), 4),
    **dict.fromkeys(("num_layers", "num_single_layers", "num_attention_heads", "num_cross_attention_heads"), 2),
    **dict.fromkeys(("attention_head_dim", "cross_attention_head_dim", "sample_size", "pos_embed_max_size"), 8),
    **dict.fromkeys(("cross_attention_dim", "caption_projection_dim"), STATES),
}
"""Arguments of a small denoiser."""
WHOLE = re.compile(r"(.+?)(?:Encoder|PreTrained|Model|For[A-Z])")
BATCHED = ("[latents] * 2", "[latents, latents]", "[latent_model_input] * 2")


@dataclass(frozen=True)
class Facts:
    """What could be read.

    Args:
        pipeline: the pipeline's class.
        parts: the names of its parts' classes; "" if the code does not say.
        needed: the parts without a default.
        denoiser: the attribute with the denoiser.
        returns: what `encode_prompt` returns, in words of `Family.returns`.
        arguments: the names of the arguments of `encode_prompt`.
        takes: the names of the denoiser's arguments.
        sizes: the names of the arguments of the denoiser's constructor.
        apart: whether unconditional predictions have a denoiser call of their own.
    """

    pipeline: str
    parts: dict[str, str]
    needed: tuple[str, ...]
    denoiser: str
    returns: tuple[str, ...]
    arguments: tuple[str, ...]
    takes: tuple[str, ...]
    sizes: tuple[str, ...]
    apart: bool

    @property
    def encoders(self) -> tuple[str, ...]:
        """The prefix of each text encoder's class."""
        named = [name for name in self.parts if name.startswith("text_encoder")]
        return tuple(_prefix(self.parts[name]) for name in sorted(named))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.parts if name.startswith("tokenizer")))

    @property
    def bidirectional(self) -> tuple[str, ...]:
        """The tokenizers whose text encoders are not causal."""
        names = [name for name, part in self.parts.items() if re.match("(U?MT5|T5|Bert)", part)]
        return tuple(name.replace("text_encoder", "tokenizer") for name in names if name.startswith("text_encoder"))

    @property
    def small(self) -> dict[str, int]:
        """The arguments of a small denoiser."""
        known = SMALL | ({self.width: TEXT} if self.width else {})
        return {name: known[name] for name in self.sizes if name in known}

    @property
    def width(self) -> str:
        """The entry of the denoiser's config with the width of its text; "" if no known one is there."""
        return next((name for name in WIDTHS if name in self.sizes), "")

    def argument(self, *words: str) -> str:
        """The first argument of the denoiser whose name holds one of these words; "" if there is none."""
        return next((name for word in words for name in self.takes if word in name), "")


def read(pipeline: str) -> Facts:
    """The facts on a pipeline of diffusers.

    Raises:
        ValueError: there is no such class, or it lacks `encode_prompt` or a denoiser.
    """
    import diffusers

    checks.text("--pipeline", pipeline)
    cls: Any = getattr(diffusers, pipeline, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        cure = "Name one that this version has, such as Lumina2Pipeline."
        raise ValueError(checks.refusal("a pipeline class of diffusers", pipeline, cure))
    made = list(inspect.signature(cls).parameters.values())
    parts = {each.name: _named(each.annotation) for each in made}
    denoiser = next((name for name in ("transformer", "unet") if name in parts), "")
    network: Any = getattr(diffusers, parts.get(denoiser, ""), None)
    encode = getattr(cls, "encode_prompt", None)
    if encode is None or network is None:
        raise ValueError(
            f"Expected a pipeline with `encode_prompt` and a `transformer` or `unet` of diffusers, got {pipeline}. "
            "Efface identifies the conditional rows by them; write the family by hand if there is another way."
        )
    source = inspect.getsource(cls.__call__)
    return Facts(
        pipeline,
        parts,
        tuple(each.name for each in made if each.default is each.empty),
        denoiser,
        _returned(encode),
        tuple(inspect.signature(encode).parameters),
        tuple(inspect.signature(network.forward).parameters)[1:],
        tuple(inspect.signature(network).parameters),
        not any(each in source for each in BATCHED),
    )


def _named(annotation: Any) -> str:
    """The name of a class in an annotation, the first one of several."""
    if isinstance(annotation, str):
        return next(iter(re.findall(r"\w+", annotation)), "")
    several = [each for each in typing.get_args(annotation) if each is not NoneType]
    return _named(several[0]) if several else getattr(annotation, "__name__", "").removeprefix("_empty")


def _prefix(name: str) -> str:
    found = WHOLE.match(name)
    return found[1] if found else name


def _returned(function: Any) -> tuple[str, ...]:
    """The names that a function returns at its end, in words of `Family.returns`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    last = values[-1] if values else None
    several = last.elts if isinstance(last, ast.Tuple) else [last]
    return tuple(_word(each.id) for each in several if isinstance(each, ast.Name))


def _word(name: str) -> str:
    """What a name such as `negative_pooled_prompt_embeds` means."""
    kind = next((word for word in ("pooled", "mask", "ids") if word in name), "")
    if "negative" not in name:
        return kind or "text"
    return "other_ids" if kind == "ids" else f"negative_{kind}" if kind else "negative"
