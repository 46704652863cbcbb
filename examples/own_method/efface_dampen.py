from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from efface.hooks import ConceptsField, Converted, CrossAttention, ErasurePrompts, Method, RowsField


@dataclass(frozen=True)
class Dampen(Method):
    """Subtracts what the concept's texts add to the output of cross-attention.

        O = O - strength * sum_n (A(E_n) - A(empty))

    Source: the example of Efface's documentation; no paper.
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    edits_attention: ClassVar[bool] = True

    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    rows: RowsField = Converted(None)

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        empty, *concepts = cross.with_empty(prompts.text)
        return out - self.strength * sum(concept - empty for concept in concepts)
