"""What draws: a pipeline under a guard. Tests replace it."""

from __future__ import annotations

import io
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import __version__, api, checks
from .fields import partial_steps
from .log import named, told

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..guard import Guard, Policy
    from .service import Service

QUALITY = 90
KEPT = 100
"""Policies whose guards are kept."""
REFUSALS = (ValueError, TypeError, OSError, ImportError)


OnPartial = Callable[[int, int, "Image"], None]


@dataclass(frozen=True)
class Row:
    """A picture to draw.

    Args:
        prompt: the prompt.
        negative: the negative prompt; None for none.
        seed: the seed.
        policy: the policy, with the further erasures of the request.
        partial: the number of partial pictures.
    """

    prompt: str
    negative: str | None
    seed: int
    policy: Policy
    partial: int = 0


@dataclass(frozen=True)
class Drawn:
    """The picture of a row, or None, and its record as JSON types."""

    picture: Image | None
    record: Mapping[str, Any]


class Backend(Protocol):
    """Draws rows under their policies."""

    @property
    def name(self) -> str:
        """The name of the model."""
        ...

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """The sizes that it draws, width and height; the first is the default."""
        ...

    @property
    def shows(self) -> bool:
        """Whether it can show partial pictures."""
        ...

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that the model does not read."""
        ...

    def check(self, policy: Policy) -> None:
        """Raises an error of `REFUSALS` if no row can be drawn under a policy, such as for want of its detector or of
        its deltas."""
        ...

    def draw(
        self, rows: Sequence[Row], call: Mapping[str, Any], on_step: Callable[[int], None], on_partial: OnPartial
    ) -> list[Drawn]:
        """Draws the rows in one call of the pipeline, with the facts of their batching key.

        Args:
            rows: the rows.
            call: the facts.
            on_step: called with the number of each finished step.
            on_partial: called with the number of a row, that of its partial picture, and the picture.
        """
        ...


class PipelineBackend:
    """Draws with a pipeline under a guard.

    Args:
        pipe: the pipeline.
        name: the name of the model, as requests give it.
        sizes: the sizes that requests may ask for, width and height.
        deltas: the folder of the deltas that policies name. None: no policy may name deltas.
    """

    def __init__(
        self, pipe: Any, name: str, sizes: Sequence[tuple[int, int]], deltas: str | Path | None = None
    ) -> None:
        from ..guard import Shelf

        self.pipe, self.name, self.sizes = pipe, name, tuple(sizes)
        self._shelf = Shelf(deltas)
        self._guards: OrderedDict[str, Guard] = OrderedDict()  # of one policy each, by its hash

    @property
    def shows(self) -> bool:
        from ..guard import Partial

        return Partial.possible(self.pipe)

    def cut_off(self, prompt: str) -> str:
        return api.cut_off(self.pipe, prompt)

    def check(self, policy: Policy) -> None:
        self._guard(policy)

    def draw(
        self, rows: Sequence[Row], call: Mapping[str, Any], on_step: Callable[[int], None], on_partial: OnPartial
    ) -> list[Drawn]:
        from ..guard import Guard, Partial

        guard = Guard.joined([self._guard(row.policy) for row in rows])
        width, height = call["size"]
        options: dict[str, Any] = {"num_inference_steps": call["steps"], "width": width, "height": height}
        if call["negative_prompt"]:
            options["negative_prompt"] = [row.negative for row in rows]
        steps = {k: partial_steps(row.partial, call["steps"]) for k, row in enumerate(rows) if row.partial}

        def show(row: int, step: int, picture: Image) -> None:
            on_partial(row, steps[row].index(step), picture)

        made = guard.draw(
            self.pipe,
            [row.prompt for row in rows],
            [row.policy.hash for row in rows],
            [row.seed for row in rows],
            call["guidance_scale"],
            on_step,
            Partial(steps, show) if steps else None,
            **options,
        )
        return [Drawn(image, record.as_json()) for image, record in zip(made.images, made.rows, strict=True)]

    def _guard(self, policy: Policy) -> Guard:
        """The guard of a policy, whose deltas were on the model once. The latest ones are kept, because their detectors
        may hold large models."""
        from ..guard import Guard

        if policy.hash not in self._guards:
            guard = Guard({policy.hash: policy}, deltas=self._shelf)
            if policy.deltas:
                guard.check(self.pipe)
            self._guards[policy.hash] = guard
        self._guards.move_to_end(policy.hash)
        while len(self._guards) > KEPT:
            self._guards.popitem(last=False)
        return self._guards[policy.hash]


def check_deltas(service: Service, backend: Backend) -> None:
    """Raises ValueError if the policy of a valid key names a delta that cannot act. No server starts then."""
    keys = [key for key in service.keys.list() if key["revoked"] is None]
    carried = {key["policy"] for key in keys if key["expires"] is None or key["expires"] > time.time()}
    for name in sorted(carried.intersection(service.policies.with_deltas())):
        try:
            stored = service.policies.latest(name)
        except ValueError as error:  # its requests are refused
            told("policy damaged", policy=name, error=named(error))
            continue
        if stored is not None and stored.policy.deltas:
            try:
                backend.check(stored.policy)
            except REFUSALS as error:
                raise ValueError(f"The policy {name!r} of a valid key cannot act. {error}") from error


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "WxH". Raises ValueError unless both are whole multiples of 8, at most 8192."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()) or not all(
        8 <= int(side) <= 8192 and int(side) % 8 == 0 for side in (width, height)
    ):
        cure = "Write for example 1024x1024."
        raise ValueError(checks.refusal("a size WxH in multiples of 8, at most 8192x8192", text, cure))
    return int(width), int(height)


def native_size(pipe: Any) -> tuple[int, int]:
    """The size that a pipeline draws by default. Raises ValueError if its configuration names none."""
    from .._weights import denoiser_of

    side = getattr(denoiser_of(pipe).config, "sample_size", None) or getattr(pipe, "default_sample_size", None)
    if not isinstance(side, int):
        raise ValueError("Expected a model whose configuration names its size, got another one. Give --size WxH.")
    factor = getattr(pipe, "vae_scale_factor", 8)
    return side * factor, side * factor


def encoded(picture: Image, kind: str, compression: int | None, facts: Mapping[str, str]) -> bytes:
    """The file of a picture: PNG with facts as texts, JPEG or WebP."""
    from PIL.PngImagePlugin import PngInfo

    file, options = io.BytesIO(), dict[str, Any]()
    if kind == "png":
        options["pnginfo"] = info = PngInfo()
        for name, text in ({"Software": f"efface {__version__}"} | dict(facts)).items():
            info.add_text(name, text)
    else:
        options["quality"] = QUALITY if compression is None else 100 - compression
    picture.save(file, format=kind.upper(), **options)
    return file.getvalue()
