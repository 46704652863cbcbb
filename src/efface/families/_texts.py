"""How a family's pipelines read and encode texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._parts import Reading, encode_parameters, encoder_name, tokenizer_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


class InTexts:
    """The facts on texts. The defaults are those of most families; others override what differs."""

    texts: tuple[tuple[str, ...], ...]
    resizable: tuple[str, ...]
    left_padded: tuple[str, ...]
    padded_to_limit: bool
    weighs_padding: bool

    @property
    def masked(self) -> bool:
        raise NotImplementedError

    def limit(self, pipe: DiffusionPipeline, tokenizer: str, settings: Mapping[str, Any]) -> int:
        """The largest number of tokens for this tokenizer, including start and end."""
        most = int(tokenizer_of(pipe, tokenizer).model_max_length)
        longest = encode_parameters(pipe).get("max_sequence_length")
        if longest is None or tokenizer not in self.resizable:
            return most
        return min(int(settings.get("max_sequence_length") or longest.default), most)

    def cleaned(
        self, pipe: DiffusionPipeline, tokenizer: Any, texts: Sequence[str], settings: Mapping[str, Any]
    ) -> list[str]:
        """Texts as the pipeline passes them to a tokenizer."""
        convert = getattr(pipe, "maybe_convert_prompt", None)  # textual inversion: one word, several tokens
        return [convert(text, tokenizer) for text in texts] if convert else list(texts)

    def read(self, pipe: DiffusionPipeline, tokenizer: str, text: str, settings: Mapping[str, Any]) -> Reading:
        """A cleaned text as an encoder reads it, without truncation."""
        make = tokenizer_of(pipe, tokenizer)
        own, ids = (list(make(text, add_special_tokens=special).input_ids) for special in (False, True))
        start = next(k for k in range(len(ids) + 1) if ids[k : k + len(own)] == own)
        return Reading(ids, slice(start, start + len(own)))

    def shift(self, tokenizer: str, reading: Reading, length: int) -> int:
        """The offset of a text's tokens in `length` columns because of padding before them."""
        return length - len(reading.ids) if reading.padded_before or tokenizer in self.left_padded else 0

    def places(
        self, pipe: DiffusionPipeline, length: int | None, settings: Mapping[str, Any]
    ) -> dict[str, tuple[slice, slice]]:
        """The position of each encoder's states in a text [L, D]: columns and features, by the tokenizer's name.

        `length` is L, which is needed if texts are not padded to the encoder's limit.
        """
        found, end = {}, 0
        for group in self.texts:
            column, feature = end, 0
            for name in group:
                if (encoder := getattr(pipe, encoder_name(name), None)) is not None:
                    most = self.limit(pipe, name, settings)
                    end = column + most if self.padded_to_limit or length is None else length
                    found[name] = slice(column, end), slice(feature, feature := feature + self.state_width(encoder))
        return found

    def state_width(self, encoder: Any) -> int:
        """The number of features of an encoder's states."""
        return int(encoder.config.hidden_size)

    def encoding_arguments(
        self, pipe: DiffusionPipeline, texts: Sequence[str], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of `encode_prompt` for these texts, one row each, without guidance."""
        call = {"prompt": list(texts), "prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, **settings}
        call |= {"device": pipe._execution_device, "do_classifier_free_guidance": False}
        taken = encode_parameters(pipe)
        return {name: value for name, value in call.items() if name in taken}

    def encoded(
        self, pipe: DiffusionPipeline, encode: Callable[..., Any], texts: Sequence[str], settings: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """What the pipeline's original `encode_prompt` returns for these texts, one row each, without guidance."""
        return self.unlisted(encode(**self.encoding_arguments(pipe, texts, settings)), settings)

    def unlisted(self, made: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """The output of an `encode_prompt` call as `returns` names it: tensors, also if the pipeline has lists."""
        out: tuple[Any, ...] = made
        return out

    def listed(self, made: tuple[Any, ...]) -> Any:
        """The reverse of `unlisted`."""
        return made

    def lengthened(self, text: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor | None] | None:
        """The same texts [N, L, D] and mask in `length` columns; None if padding would change the text."""
        if length == text.shape[1]:
            return text, mask
        if length < text.shape[1] or not self.masked or self.weighs_padding:
            return None
        seen = text.new_ones(text.shape[:2]).bool() if mask is None else mask
        return self.padded(text, length), self.padded(seen[..., None], length)[..., 0]

    def padded(self, columns: Tensor, length: int) -> Tensor:
        """Columns [..., L, D] of a text, with zeros as padding to `length` columns."""
        from torch.nn.functional import pad

        more = length - columns.shape[-2]
        return pad(columns, (0, 0, more, 0) if self.left_padded else (0, 0, 0, more))
