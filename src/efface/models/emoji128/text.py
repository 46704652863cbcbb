"""Tokenizer and text encoder of the 128-pixel models: all-MiniLM-L6-v2, with the interface that both pipelines expect.

`StableDiffusionPipeline` passes the mask of the padding and reads the token states. `FluxPipeline` passes no mask,
reads `pooler_output` of its first encoder, and asks for 512 tokens. These classes adapt the encoder, so that both
pipelines get the states of the training.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

# diffusers imports this module by path when it loads a saved pipeline, and looks for the two base classes in it.
from transformers import BertModel, BertTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

__all__ = ["EmojiTextEncoder", "EmojiTokenizer", "PreTrainedModel", "PreTrainedTokenizerFast"]


class EmojiTokenizer(BertTokenizer):
    """BERT's tokenizer, limited to `model_max_length` tokens."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (kwargs.get("max_length") or 0) > self.model_max_length:
            kwargs["max_length"] = self.model_max_length
        return super().__call__(*args, **kwargs)


class EmojiTextEncoder(BertModel):
    """BERT that masks padding by itself. Its `pooler_output` is the mean of a text's own states.

    Own tokens are all tokens except padding, including start and end.

    Example:
        >>> from efface.models.emoji128 import text_encoder
        >>> tokenizer, encoder = text_encoder()
        >>> ids = tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
        >>> out = encoder(ids)
        >>> out.last_hidden_state.shape, out.pooler_output.shape
        (torch.Size([1, 24, 384]), torch.Size([1, 384]))
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config, add_pooling_layer=False)

    @property
    def text_model(self) -> Any:
        """CLIP's attribute for its layers, which `StableDiffusionPipeline` reads when a call sets `clip_skip`."""
        raise ValueError(
            "`clip_skip` takes the states of an earlier CLIP layer, but this model was trained on the last layer of "
            "all-MiniLM-L6-v2. Leave `clip_skip` out."
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """As `BertModel.forward`."""
        if attention_mask is None and input_ids is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        as_dict = kwargs.pop("return_dict", None)
        kwargs["return_dict"] = True
        out: Any = cast("Any", super()).forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states = out.last_hidden_state
        if attention_mask is None:
            pooled = states.mean(1)
        else:
            own = attention_mask.to(states.dtype)[..., None]
            pooled = (states * own).sum(1) / own.sum(1).clamp_min(1)
        new = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=states,
            pooler_output=pooled,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return new.to_tuple() if as_dict is False else new
