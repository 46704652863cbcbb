"""Where methods meet a pipeline. This package knows no method and no family.

The names of `__all__` are public, and provisional until version 1.0: they may change between minor versions, and
CHANGELOG says how. `Method` is the base class for methods of your own; docs/own_method.md leads through one.

Glossary:

- *Method*: what acts at run time, such as EIUP. Yours is a frozen dataclass derived from `Method`.
- *Denoiser*: the UNet or transformer that predicts the noise. Each has one ordered list of the methods that are on
  (`Site`); methods come off in any order, and with the last one every hook is gone.
- *Call of the pipeline*: one `pipe(...)`. It is followed from `check_inputs` to `maybe_free_model_hooks` by methods of
  the pipeline object that are wrapped (`pipeline`). `encode_prompt` says which rows of the batch will be conditional.
- *Denoiser call*: one call of the denoiser, once or twice a step. `around` runs in place of it.
- *Batch rows*: the rows of a denoiser call: unconditional ones, then conditional ones, then further predictions that
  methods ask for; where these texts have another length, a further call of the denoiser holds them. The engine
  compares the batch with what `encode_prompt` returned (`batch`); a caller without a pipeline says it by
  `efface.conditional_rows`.
- *Erasure prompts*: texts of the concept that take part in attention. They are encoded in each call of the pipeline,
  the same texts once.
- *Layer*: an attention module. Its query is seen behind `to_q` and its output is edited in front of `to_out[0]`, on
  conditional rows; processors stay as they are. Unconditional rows are edited by methods that say so
  (`touches_uncond`), where they read another text than the empty one.
- *Prediction*: what the denoiser puts out for the conditional rows, which `guide` changes before the pipeline's own
  guidance works on it.
- *Plan and record*: what each method has to do in a denoiser call, and what it did (`watch`). Where the two differ the
  call raises: nothing is drawn without the methods and without a word.

Imports run from `texts`, `attention`, `watch`, `copies` and `forward` to `contract`, `prompts`, `layers`, `pipeline`,
`batch`, `edits`, `prediction`, `step`, `denoiser`, `sites` and `method`.
"""

from ..core import ConceptsField, RowsField
from ..fields import Converted, computed
from .attention import CrossAttention, SelfAttention
from .contract import DenoiserCall, Encoding, Memory, Prediction
from .method import Method
from .texts import ErasurePrompts, Text

__all__ = [
    "ConceptsField",
    "Converted",
    "CrossAttention",
    "DenoiserCall",
    "Encoding",
    "ErasurePrompts",
    "Memory",
    "Method",
    "Prediction",
    "RowsField",
    "SelfAttention",
    "Text",
    "computed",
]
