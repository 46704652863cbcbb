"""The possible needs of methods, and offers of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Offer(NamedTuple):
    """A possible offer of a family: its words in messages, and its meaning."""

    words: str
    meaning: str


OFFERS: Mapping[str, Offer] = {
    "cross_text": Offer(
        "cross-attention layers",
        "The denoiser reads the text in attention layers whose queries come from the picture, keys and values from the "
        "text.",
    ),
    "joint_text": Offer(
        "joint attention layers",
        "Text and picture attend to each other in the same attention layers.",
    ),
    "softmax_self": Offer(
        "softmax self-attention layers",
        "The picture attends to itself in layers of its own, by softmax.",
    ),
    "causal_text": Offer(
        "a causal text encoder",
        "A text token sees earlier tokens only, so a prefix of a text keeps its states.",
    ),
    "padded_text": Offer(
        "texts padded to one length",
        "All texts have the encoder's length, so that columns of two texts correspond.",
    ),
    "guidance": Offer(
        "guidance",
        "Each step of a call can have a prediction with the prompt and one without it.",
    ),
    "guidance_scale": Offer(
        "the guidance scale of the call",
        "The pipeline object exposes the guidance scale of its current call.",
    ),
    "text_weights": Offer(
        "weights that read the encoded text",
        "The denoiser has keys and values that read the states of the text encoder without a projection in front.",
    ),
    "training": Offer(
        "a denoiser that trains outside of the pipeline's call",
        "The denoiser predicts from latents, time and encoded text alone, on steps of the pipeline's scheduler.",
    ),
    "bottleneck": Offer(
        "a bottleneck",
        "A module in the middle of the denoiser, whose output is smaller than its input.",
    ),
    "learned_words": Offer(
        "prompts that keep learned words",
        "A word in angle brackets reaches the text encoder as it is written. PixArt removes such words as HTML.",
    ),
    "text_inputs": Offer(
        "an input layer for the encoded text",
        "One linear layer reads the states of the text encoder before all other layers of the denoiser.",
    ),
    "flow_training": Offer(
        "a flow-matching denoiser that trains outside of the pipeline's call",
        "As `training`, for a denoiser that predicts velocity.",
    ),
}
