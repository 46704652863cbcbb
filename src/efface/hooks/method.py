"""The public base class of run-time methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import Handle
from .contract import Contract
from .sites import site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Method(Contract):
    """The base class of run-time methods, including yours. Provisional until version 1.0.

    Provisional means: until 1.0, names, arguments and results in `efface.hooks` may change between minor versions.
    CHANGELOG lists each change under "Provisional API", with its replacement. Patch versions change none of them.

    A method is a frozen dataclass whose fields are its settings. It declares its properties in class attributes, and
    overrides functions. See the tutorial docs/own_method.md; `efface.testing.check` tests a method.

    Args:
        concepts: the first field: names of shipped concepts, `Concept` objects, or a sequence of them. After
            `__post_init__` it holds a tuple of `Concept` objects.
        strength: an optional field, >= 0, in a unit of your choice, which can be set on the handle.
        rows: an optional field, None by default: the concepts of each prompt of a batch.
        window: an optional field, (start, end) as fractions of the trajectory: 0 is pure noise, 1 the picture. The
            engine skips the method outside of it.

    Class attributes, as constants or properties:

    - `off`: the field values that make it the identity, such as `{"strength": 0.0}`; None if there are none.
    - `needs`: requirements of the pipeline, as names from `efface.families.OFFERS`, such as `("cross_text",)`.
    - `edits_attention`: it overrides `edit`. `edits_self_attention`: it also overrides `edit_self`.
    - `steers`: names of the denoiser's modules, such as "mid_block", whose outputs its `steer` changes.
    - `guides`: it overrides `guide`. Each conditional row is predicted once more for the concept's text.
    - `touches_uncond`: it may change unconditional rows.
    - `added`: the fields that a later version of the method added. Records omit them at their defaults, so runs that
    were started with the earlier version continue.
    - `counts_steps`: its times are shares of the steps of a pipeline call, for any number of denoiser calls per step.
    Step k of N, counted from 0, is at (k + 1/2) / N. Without it, and in direct denoiser calls, times follow the noise.

    Shapes: a layer's output [B, Q, C] in `edit` and `edit_self`; predictions [B, C, h, w] in `guide` (FLUX: [B, L, C]);
    text [B, L, D] in `reread`. B counts the conditional rows with the same concepts.

    Raises:
        ValueError: there is no concept, or an unknown one; `strength` is below 0; or `window` is outside [0, 1]. On
            `apply`: the pipeline lacks a requirement, or a text encoder cannot read a phrase.
        TypeError: `concepts` or `rows` has another type. On `apply`: the family of the pipeline is unknown.

    Example:
        >>> from dataclasses import dataclass
        >>> import efface
        >>> from efface.hooks import Method, Prediction
        >>> @dataclass(frozen=True)
        ... class Away(Method):
        ...     needs, guides, off = ("guidance",), True, {"strength": 0.0}
        ...     concepts: tuple[efface.Concept, ...] = ()
        ...     strength: float = 1.0
        ...
        ...     def guide(self, seen: Prediction):
        ...         return -self.strength * (seen.concept - seen.negative)
        >>> pipe = efface.load("emoji")
        >>> with Away("alcohol", strength=0.5).apply(pipe) as handle:
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> handle.record["calls"]
        2
    """

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Applies the method to a pipeline. It acts from the next call on.

        Args:
            pipe: a diffusers text-to-image pipeline of a known family, also with other methods.

        Returns:
            A handle that removes the method: by `remove()`, or as a context manager.

        Raises:
            ValueError: the pipeline lacks a requirement, or cannot read a phrase.
            TypeError: the family of the pipeline is unknown.
        """
        here = site(pipe)
        try:
            return here.add(pipe, self)
        except BaseException:
            here.forget_if_empty()
            raise
