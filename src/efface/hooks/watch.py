"""Records the edits of each eraser in a pipeline call, and words the errors for calls that did not go as planned.

By plan, a method acts in every denoiser call, on every cross-attention layer or on the prediction, for the rows with
concepts. `exempt` counts the exceptions. The engine compares the plan with the execution, and raises if they differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

NO_CONDITIONAL_ROWS = "unconditional call"
NO_CONCEPTS = "no concepts for these rows"
OUTSIDE_WINDOW = "outside the window"
OFF = "strength 0"
NO_GUIDANCE = "no guidance in this step"


@dataclass
class Record:
    """The edits of one eraser during the latest pipeline call.

    Args:
        layers: number of cross-attention layers edited per call; 0 for other methods.
        log: for each denoiser call, the edited rows and the reason if there are none. Calls of compiled denoisers are
            not logged.
    """

    layers: int = 0
    log: list[tuple[frozenset[int], str]] = field(default_factory=list)

    def add(self, rows: Iterable[int], exempt: str = "") -> None:
        """Records one denoiser call: the edited rows, or the reason for none."""
        self.log.append((frozenset() if exempt else frozenset(rows), exempt))

    def as_json(self) -> dict[str, Any]:
        """As JSON types: the number of calls, that of the edits of each row, and that of each reason for none."""
        rows = Counter(row for edited, _ in self.log for row in edited)
        return {
            "calls": len(self.log),
            "rows": {str(row): rows[row] for row in sorted(rows)},
            "exempt": dict(Counter(exempt for _, exempt in self.log if exempt)),
            "layers": self.layers,
        }


TWO_THREADS = (
    "Two threads use one pipeline with erasers, which would mix their pictures. Use it from one thread at a time, or "
    "give each thread a separate pipeline."
)
UNCOMPILED = (
    "This eraser makes a further denoiser call, which a compiled denoiser does not allow. Use a pipeline that "
    "is not compiled, or a fixed strength and one trajectory."
)
JOINT_COMPILED = (
    "Efface cannot edit joint attention in a denoiser that is compiled in one graph. Compile it without "
    "`fullgraph=True`, or use a method that edits only prompts."
)
CHECKPOINTED = (
    "Gradient checkpointing runs attention again in `backward`, when the erasers no longer know the step. Call "
    "`disable_gradient_checkpointing()` on the denoiser while erasers are applied."
)

NOT_BEGUN = (
    "An eraser was applied, or the pipeline was called, in the middle of another loop over the steps. Apply erasers "
    "before the loop, and draw with one pipeline at a time."
)


def other_denoiser(name: str, kind: str) -> str:
    """A loop calls another denoiser than that of the pipeline with the erasers."""
    return (
        f"Expected the `{name}` of the {kind} that the guider was made with, got another one, which would draw without "
        "its erasers. Give both pipelines the same parts."
    )


def swapped(name: str, kind: str) -> str:
    """The pipeline's denoiser is not the one with the erasers."""
    return (
        f"`pipe.{name}` was replaced after `apply`, so this {kind} would draw without its erasers. Restore the old "
        "one, or call `handle.remove()` and apply the erasers again."
    )


def bypassed(name: str) -> str:
    """The denoiser call did not pass the erasers."""
    return (
        f"The pipeline's {name} was called without the erasers, because an offload hook, a cache or a patch replaced "
        "its `forward` during the call. Replace it between two calls, or remove the erasers first."
    )


def not_entered(name: str) -> str:
    """A step of the pipeline did not call the denoiser with the erasers."""
    return (
        f"A step of the pipeline did not call the {name} with the erasers, because `pipe.{name}` was replaced during "
        "the call or a cache skipped the step. Do that between two calls, or remove the erasers first."
    )


def not_forwarded(names: Sequence[str]) -> str:
    """A method's `around` did not call the following methods."""
    return (
        f"`around` of a method ({', '.join(names)}) did not call `forward()`, so this step would be drawn without the "
        "other methods. Call it once, and return its result or a changed result."
    )


def missed(layers: Sequence[str], of: int) -> str:
    """Attention layers ran without the erasers."""
    return (
        f"{len(layers)} of {of} attention layers ran without the erasers, first {layers[0]!r}, probably because of a "
        "processor that uses the weights of `to_q` or `to_out` directly (fused kernels), modules replaced during the "
        "call, or a cache. Use a processor that calls these modules, such as `AttnProcessor2_0`, or disable the cache."
    )


def unseen(layers: Sequence[str], of: int) -> str:
    """Joint attention layers did not call torch's attention once."""
    return (
        f"{len(layers)} of {of} joint attention layers did not compute their attention in one call of torch's "
        f"`scaled_dot_product_attention`, first {layers[0]!r}, so Efface cannot see it. Choose diffusers' attention "
        'backend "native" (`set_attention_backend`), a processor that calls it, or a method that edits only prompts.'
    )


def other_attention(layer: str, got: str) -> str:
    """A joint attention layer computes another kind of attention."""
    return (
        f"Expected the joint attention layer {layer!r} to attend from all columns to all columns, got {got}, which "
        "Efface cannot split between the texts. Call the pipeline without attention masks, and without modules that "
        "drop or add columns."
    )


def not_steered(modules: Sequence[str], denoiser: str) -> str:
    """Modules whose outputs an eraser changes did not run."""
    return (
        f"Expected the {denoiser} to run {', '.join(map(repr, modules))}, whose output an eraser changes, but this "
        "call ran without it, because the module was removed or replaced during it, or a cache skipped it. Restore the "
        "module or disable the cache, or remove the eraser."
    )


def other_rows(layer: str, found: int, expected: int) -> str:
    """A layer's rows differ from those of the denoiser call."""
    return (
        f"Layer {layer!r} runs on {found} rows, but the denoiser call has {expected}, so Efface cannot identify the "
        "conditional rows. Disable any cache or module in the denoiser that drops or adds rows."
    )


def outside(layer: str) -> str:
    """A layer ran outside of a denoiser call."""
    return (
        f"Layer {layer!r} ran outside of a denoiser call, or the denoiser's `forward` was replaced during the call, so "
        "Efface cannot identify the conditional rows. Call the denoiser itself, and replace its `forward` between two "
        "pipeline calls."
    )


def cached(name: str, hook: str) -> str:
    """The denoiser has a cache of diffusers."""
    return (
        f"The {name} has a cache ({hook}), which reuses outputs of other steps and rows without the erasers' edits. "
        f"Call `pipe.{name}.disable_cache()`, or use a method that edits only prompts."
    )


def unknown_rows(rows: int, about: str) -> str:
    """The conditional rows of a denoiser call are unknown."""
    return (
        f"The denoiser got {rows} rows of text that differ from the output of `encode_prompt` ({about}), so Efface "
        "cannot identify the conditional rows. If a callback changes the prompt during the call, draw each prompt in a "
        "separate call. If another pipeline shares this denoiser, apply the erasers to that pipeline. If you call "
        "the denoiser yourself, do it inside `with efface.conditional_rows(pipe, [...]):`. A pipeline that adds rows "
        "is not supported."
    )


CACHES = (
    "pyramid_attention_broadcast",
    "faster_cache",
    "fbc_",
    "mag_cache",
    "taylorseer",
    "sea_cache",
    "text_kv_cache",
)
"""Prefixes of the names of diffusers' hooks that reuse outputs of other steps."""


def cache_on(modules: Iterable[Any]) -> str:
    """The name of a cache's hook on one of these modules; "" if there is none."""
    for module in modules:
        registry = vars(module).get("_diffusers_hook")
        for name in registry.hooks if registry is not None else ():
            if name.startswith(CACHES):
                return str(name)
    return ""
