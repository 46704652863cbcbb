"""Rows in place of input embeddings of a pipeline's text encoders, without a change of their tables."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._text import encoder_of, read, readers
from .._weights import digest, stored

Rows = Mapping[str, Tensor]
"""Input embeddings [k, D], by the name of the tokenizer whose encoder reads them."""


class _Reading(threading.local):
    """Where the encoder calls of this thread have rows: by `Substitute`, the place of each token's row, or -1."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


_READING = _Reading()


def tables(pipe: Any) -> dict[str, Tensor]:
    """The input embeddings [ids, D] of every text encoder, by the tokenizer's name.

    Raises:
        ValueError: an encoder has none that gradients can reach, or they are not in memory.
    """
    return {name: table(encoder_of(pipe, name)) for name in readers(pipe)}


def table(encoder: Any) -> Tensor:
    """The input embeddings [ids, D] of a text encoder."""
    module = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else None
    weight = getattr(module, "weight", None)
    floats = isinstance(weight, Tensor) and weight.is_floating_point()
    if not isinstance(encoder, nn.Module) or not isinstance(module, nn.Module) or not floats:
        raise ValueError(
            f"Expected a text encoder whose input embeddings are a table of floats, got {type(encoder).__name__}. "
            "Load the encoder in float32, or use a method that writes whole texts."
        )
    return stored(module, "weight").detach()


def mean_row(pipe: Any, text: str, count: int = 1) -> dict[str, Tensor]:
    """The mean input embedding of a text's tokens in each encoder, `count` times: a start for new rows."""
    found, known = {}, tables(pipe)
    for name in readers(pipe):
        seen = read(pipe, text, name)
        found[name] = known[name][seen.ids[seen.own]].float().mean(0).repeat(count, 1)
    return found


class Substitute:
    """Hooks on a text encoder that put rows in place of the input embeddings of some ids.

    Ids that the table lacks are replaced before the encoder sees them. CLIP finds its end token by its id, in older
    configs as the largest id, so the pooled state stays that of the end token.

    Args:
        encoder: the text encoder.
        ids: the ids [k].
        rows: their embeddings, as tensors [., D] with k rows together. Gradients reach them.
        instead: the id that the encoder sees for ids that its table lacks. None: the table has all ids.
    """

    def __init__(self, encoder: Any, ids: Tensor, rows: Sequence[Tensor], instead: int | None = None) -> None:
        self.ids, self.rows, self.instead, self.size = ids, rows, instead, len(table(encoder))
        weight = encoder.get_input_embeddings().weight
        shared = [module for module in encoder.modules() if getattr(module, "weight", None) is weight]  # T5: two
        self.hooks = [encoder.register_forward_pre_hook(self.begin, with_kwargs=True)]
        self.hooks += [module.register_forward_hook(self.put) for module in shared]

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        same = ids[..., None] == self.ids.to(ids.device)
        which = torch.where(same.any(-1), same.int().argmax(-1), -1)
        _READING.of[self] = which
        if self.instead is None:
            return None
        seen = torch.where(which >= 0, self.instead, ids)
        if bool((seen >= self.size).any()):
            raise RuntimeError(
                f"Expected token ids below {self.size} or of new words, got {int(seen.max())}. Other code changed the "
                "tokenizer or the text encoder while `Tokens` were applied; load the pipeline again."
            )
        return ((seen, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": seen})

    def put(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        found = _READING.of.pop(self, None)
        if found is None or found.numel() != args[0].numel():
            return None
        which = found.reshape(args[0].shape).to(out.device)  # offload moves ids after `begin`
        rows = torch.cat([each.to(out) for each in self.rows])[which.clamp(min=0)]
        if (scale := getattr(module, "embed_scale", None)) is not None:  # Gemma multiplies what it looks up
            rows = rows * torch.as_tensor(scale).to(rows)
        return torch.where((which >= 0)[..., None], rows, out)

    def take_off(self) -> None:
        for hook in self.hooks:
            hook.remove()


@contextlib.contextmanager
def substituted(pipe: Any, ids: Mapping[str, Tensor], rows: Rows) -> Iterator[Any]:
    """Inside the block, the text encoders read `rows` instead of the embeddings of these ids of their tables."""
    made = [Substitute(encoder_of(pipe, name), ids[name], [each]) for name, each in rows.items()]
    try:
        yield pipe
    finally:
        for each in made:
            each.take_off()


@contextlib.contextmanager
def only_rows_learn(pipe: Any, start: Rows) -> Iterator[dict[str, nn.Parameter]]:
    """Copies of `start` in float32 as the only parameters that gradients reach.

    The block must not change the encoders' tables.

    Raises:
        RuntimeError: after the block, a row of a table differs bit by bit from before.
    """
    before = digest(tables(pipe))
    with frozen(pipe):
        where = {name: known.device for name, known in tables(pipe).items()}
        yield {n: nn.Parameter(row.detach().to(where[n], torch.float32, copy=True)) for n, row in start.items()}
    if digest(tables(pipe)) != before:
        raise RuntimeError(
            "The embeddings of known words changed while new words were learned. Give the optimiser only the new rows."
        )


@contextlib.contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Inside the block, no weight of the pipeline takes gradients, and no layer drops activations."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    trained = [weight for part in parts for weight in part.parameters() if weight.requires_grad]
    training = [module for part in parts for module in part.modules() if module.training]
    for weight in trained:
        weight.requires_grad_(False)
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
        for module in training:
            module.training = True


def optimiser(rows: Mapping[str, nn.Parameter], lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over new rows alone, so that its weight decay cannot change other words."""
    return torch.optim.AdamW(list(rows.values()), lr=lr, weight_decay=weight_decay)


def ids_of(tokenizer: Any, words: Sequence[str]) -> Tensor:
    """The ids [k] of words that are one token each."""
    return torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
