"""What each eraser did in a call of the pipeline, and the words for a call that did not go as planned.

A method plans to act in every denoiser call, on every cross-attention layer or on the prediction, on the rows that it
has concepts for. `exempt` names the calls in which it does not. The engine compares the plan with what ran and
raises where they differ.
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


@dataclass
class Record:
    """What one eraser did since the latest call of the pipeline began.

    Args:
        calls: denoiser calls that went through the guard. Compiled denoisers are not counted.
        rows: conditional row of the batch to the number of calls in which the eraser acted on it.
        exempt: reason to the number of calls in which the eraser had nothing to do.
        layers: cross-attention layers that it edits in each of its calls; 0 for methods that work elsewhere.
    """

    calls: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    exempt: Counter[str] = field(default_factory=Counter)
    layers: int = 0

    def add(self, rows: Iterable[int], exempt: str = "") -> None:
        """One denoiser call: the rows it acted on, or why on none."""
        self.calls += 1
        if exempt:
            self.exempt[exempt] += 1
        else:
            self.rows.update(rows)

    def as_json(self) -> dict[str, Any]:
        """As JSON types."""
        rows = {str(row): count for row, count in sorted(self.rows.items())}
        return {"calls": self.calls, "rows": rows, "exempt": dict(self.exempt), "layers": self.layers}


TWO_THREADS = (
    "Two threads use one pipeline with erasers on, which would mix up their pictures. Let them take turns, or give "
    "each a pipeline of its own."
)
UNCOMPILED = (
    "This eraser makes a denoiser call of its own, which a compiled denoiser does not allow. Use a pipeline that "
    "is not compiled, or a fixed strength and one trajectory."
)
CHECKPOINTED = (
    "Gradient checkpointing runs attention again in `backward`, when the erasers no longer know which step it belongs "
    "to. Call `disable_gradient_checkpointing()` on the denoiser while erasers are on and gradients are needed."
)


def swapped(name: str, kind: str) -> str:
    """The pipeline has another denoiser than the one that has the erasers."""
    return (
        f"`pipe.{name}` was replaced after `apply`, so this {kind} would draw without its erasers. Put the old one "
        "back, or call `handle.remove()` and apply the erasers again."
    )


def bypassed(name: str) -> str:
    """The denoiser was called, but not through the guard."""
    return (
        f"The pipeline's {name} was called without passing the erasers: its `forward` was replaced during the call, by "
        "an offload hook, a cache or a patch. Replace it between two calls, or take the erasers off first."
    )


def not_entered(name: str) -> str:
    """A step of the pipeline in which the denoiser with the erasers was not called."""
    return (
        f"A step of the pipeline did not call the {name} that has the erasers, so its picture is not guarded. "
        f"`pipe.{name}` was replaced during the call, or a cache skipped the step: do that between two calls, or take "
        "the erasers off first."
    )


def not_forwarded(names: Sequence[str]) -> str:
    """A method's `around` that did not go on to the methods behind it."""
    return (
        f"`around` of a method ({', '.join(names)}) did not call `forward()`, so this step would be drawn without the "
        "other methods. Call it once, and return what it returns or a change of that."
    )


def missed(layers: Sequence[str], of: int) -> str:
    """Attention layers that did not do what the erasers need."""
    return (
        f"{len(layers)} of {of} attention layers ran without the erasers, the first of them {layers[0]!r}. "
        "Likely causes: an attention processor that uses the weights of `to_q` or `to_out` directly (fused kernels), "
        "modules replaced during the call, or a cache that skips layers. Use a processor that calls these modules, "
        "such as "
        "`AttnProcessor2_0`, or switch the cache off."
    )


def other_rows(layer: str, found: int, expected: int) -> str:
    """A layer with other rows than the denoiser call."""
    return (
        f"Layer {layer!r} runs on {found} rows, but the denoiser call has {expected}, so it is not known which of them "
        "are conditional. Something inside the denoiser drops or adds rows, such as a cache: switch it off."
    )


def outside(layer: str) -> str:
    """A layer that runs when no denoiser call is going on."""
    return (
        f"Layer {layer!r} runs outside a call of the denoiser, or the denoiser's `forward` was replaced during the "
        "call, so it is not known which rows are conditional. Call the denoiser itself, and replace its `forward` "
        "between "
        "two calls of the pipeline."
    )


def cached(name: str, hook: str) -> str:
    """A cache of diffusers on the denoiser."""
    return (
        f"The {name} has a cache on ({hook}), which reuses outputs of other steps and rows in place of what the "
        f"erasers would make. Call `pipe.{name}.disable_cache()`, or use method 'safree', which works on the prompt."
    )


def unknown_rows(rows: int, about: str) -> str:
    """A denoiser call whose conditional rows cannot be told."""
    return (
        f"The denoiser got {rows} rows of text that are not what `encode_prompt` returned ({about}), so it is not "
        "known which rows are conditional. If a callback changes the prompt during the call, draw each prompt in a "
        "call of its own. If another pipeline shares this denoiser, apply the erasers to that pipeline. If you call "
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
"""How the names of diffusers' hooks begin that reuse outputs of other steps."""


def cache_on(modules: Iterable[Any]) -> str:
    """The name of a cache's hook on one of these modules; "" if there is none."""
    for module in modules:
        registry = vars(module).get("_diffusers_hook")
        for name in registry.hooks if registry is not None else ():
            if name.startswith(CACHES):
                return str(name)
    return ""
