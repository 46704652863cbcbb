"""Connects run-time methods with pipelines. This package knows no method and no family.

The names of `__all__` are public, and provisional until version 1.0: they may change between minor versions, with an
entry in CHANGELOG. `Method` is the base class for your methods; docs/own_method.md is a tutorial.

Glossary:

- *Method*: a run-time eraser, such as EIUP. It is a frozen dataclass derived from `Method`.
- *Denoiser*: the UNet or transformer that predicts the noise. Each has one ordered list of applied methods (`Site`).
Methods can be removed in any order; with the last one, all hooks disappear.
- *Call of the pipeline*: one `pipe(...)`. Efface wraps methods of the pipeline object to follow it from `check_inputs`
to `maybe_free_model_hooks` (`pipeline`). `encode_prompt` determines which rows of the batch are conditional. A record
in a context variable says in which call the current code is; the denoiser belongs to one call at a time (`calls`).
- *Denoiser call*: one call of the denoiser, once or twice per step. `around` replaces it.
- *Batch rows*: the rows of a denoiser call: unconditional rows, then conditional rows, then further predictions for
methods. Texts of another length need a further denoiser call. The engine compares the batch with the output of
`encode_prompt` (`batch`). Callers without a pipeline declare the rows with `efface.conditional_rows`.
- *Erasure prompts*: texts of the concept that methods use in attention. Each pipeline call compares the
text encoders with those that encoded them, and encodes them again after any change (`_encodings`). Methods with the
same list of texts share one encoding. Lists are not divided: in another batch a text may round differently, and then an
eraser's picture would depend on which other erasers are applied.
- *Layer*: an attention module. Hooks read its query after `to_q` and edit its output before `to_out[0]`, on conditional
rows. Processors stay unchanged. Methods with `touches_uncond` also edit unconditional rows whose text is not the empty
one.
- *Joint layer*: an attention module in which prompt and picture attend to each other. The denoiser carries the erasure
prompts and neutral texts beside the prompt (`carried`). The hook divides the module's one call of torch's attention, so
that prompt and picture do not see these texts, and passes the picture's output to the edits (`joint`).
- *Output*: of any other module of the denoiser that a method names in `steers`, such as a UNet's mid block. `steer`
changes it on conditional rows.
- *Prediction*: the denoiser's output for the conditional rows. `guide` changes it before the pipeline applies its
guidance.
- *Plan and record*: the expected and the actual edits of each method in a denoiser call (`watch`). If the two differ,
the call raises an error, so no picture is drawn without the methods unnoticed.

Imports run from `texts`, `attention`, `watch`, `copies` and `forward` to `contract`, `carried`, `joint`, `prompts`,
`layers`, `unconditional`, `calls`, `pipeline`, `batch`, `edits`, `prediction`, `step`, `outputs`, `denoiser`, `sites`,
`loops` and `method`.
"""

from ..core import ConceptsField, RowsField
from ..fields import Converted, computed
from .attention import CrossAttention, SelfAttention
from .contract import DenoiserCall, Encoding, Memory, Prediction
from .joint import JointAttention
from .method import Method
from .texts import ErasurePrompts, Text

__all__ = [
    "ConceptsField",
    "Converted",
    "CrossAttention",
    "DenoiserCall",
    "Encoding",
    "ErasurePrompts",
    "JointAttention",
    "Memory",
    "Method",
    "Prediction",
    "RowsField",
    "SelfAttention",
    "Text",
    "computed",
]
