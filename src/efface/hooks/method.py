"""The public base class of run-time methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import Handle
from .contract import Contract
from .sites import site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Method(Contract):
    """The base class of run-time methods, for methods of your own too. Provisional until version 1.0.

    Provisional means: until 1.0 the names of `efface.hooks`, what they take and what they return may change between
    minor versions. CHANGELOG lists each change under "Provisional API", with what to write instead. A patch version
    changes none of them.

    A method is a frozen dataclass whose fields are its settings. It says what it is in class attributes, and overrides
    what it changes; docs/own_method.md leads through one, and `efface.testing.check` tries it.

    Args:
        concepts: the first field: names of shipped concepts, `Concept` objects, or a sequence of them. After
            `__post_init__` it holds a tuple of `Concept` objects.
        strength: a field that you may have, >= 0, in units of your choice; it can be set on the handle.
        rows: a field that you may have, None by default: the concepts of each prompt of a batch.
        window: a field that you may have, (start, end) as fractions of the trajectory; outside of it the engine leaves
            the method out. 0 is pure noise, 1 the picture.

    Class attributes, as constants or properties:

    - `off`: the field values that make it the identity, such as `{"strength": 0.0}`; None if there are none.
    - `needs`: what a pipeline has to offer, names from `efface.families.OFFERS`, such as `("cross_text",)`.
    - `edits_attention`: it overrides `edit`. `edits_self_attention`: it overrides `edit_self` as well.
    - `guides`: it overrides `guide`. Each conditional row is predicted once more for the concept's text.
    - `touches_uncond`: it may change unconditional rows.
    - `counts_steps`: its times are shares of the steps of a pipeline's call, however often a scheduler calls the
      denoiser in a step. Step k of N, counted from 0, is at (k + 1/2) / N. Without it, and in denoiser calls without a
      pipeline, times follow the noise.

    Shapes: a layer's output [B, Q, C] in `edit` and `edit_self`; predictions [B, C, h, w] in `guide` (FLUX: [B, L, C]);
    text [B, L, D] in `reread`. B counts the conditional rows with the same concepts.

    Raises:
        ValueError: no concept, an unknown one, a strength below 0, or a window out of [0, 1]; on `apply`: a pipeline
            without what the method needs, or a phrase that a text encoder cannot read.
        TypeError: `concepts` or `rows` of another type; on `apply`: a pipeline of an unknown family.

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
        """Puts the method on a pipeline; it acts from the next call on.

        Args:
            pipe: a diffusers text-to-image pipeline of a known family. Other methods may be on it already.

        Returns:
            A handle that takes the method off again: by `remove()`, or as a context manager.

        Raises:
            ValueError: the pipeline lacks what the method needs, or cannot read a phrase.
            TypeError: a pipeline of an unknown family.
        """
        here = site(pipe)
        try:
            return here.add(pipe, self)
        except BaseException:
            here.forget_if_empty()
            raise
