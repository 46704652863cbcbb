"""The page of threat models: who can do what, and which attack of Efface tries it."""

from __future__ import annotations

from efface import registry
from efface.attacks._contract import ACCESS
from experiments.docs import table

MEANS = {
    "text": "writes prompts and sets the arguments of an ordinary call, as in a hosted service",
    "embeddings": "gives the denoiser's text inputs in place of a prompt",
    "gradients": "has gradients of the guarded model, and uses them to find a text",
    "sampler": "controls the sampling loop",
    "weights": "changes the weights",
}
RUN_TIME = {
    "text": "lowers the rate",
    "embeddings": "acts on given embeddings, or refuses them",
    "gradients": "acts; searched texts may pass",
    "sampler": "no protection: the eraser can be left out",
    "weights": "no protection: the weights are unchanged",
}
EDITED = {
    "text": "lowers the rate",
    "embeddings": "acts; learned embeddings may pass",
    "gradients": "acts; searched texts may pass",
    "sampler": "acts; other sampling may bring the concept back",
    "weights": "no protection: a few pictures can teach it again",
}


def attacks() -> dict[str, list[str]]:
    """The attacks of Efface by the access that they need."""
    found: dict[str, list[str]] = {access: [] for access in ACCESS}
    for name in registry.methods("attacks"):
        access = registry.resolve(name).__dict__.get("access")
        if isinstance(access, str):
            found[access].append(name)
        else:  # depends on the fields
            found[registry.resolve(name)().access].append(name)
    return found


def page() -> str:
    known = attacks()
    who = [
        [access, MEANS[access], RUN_TIME[access], EDITED[access], ", ".join(f"`{name}`" for name in known[access])]
        for access in ACCESS
    ]
    return "\n\n".join(
        [
            "# Threat models",
            "What an eraser can promise depends on what an attacker has. The rows go from the least access to the "
            "most. "
            "Whoever has one has those above it.",
            table(["access", "the attacker", "a run-time eraser", "an edited model (delta)", "attacks in Efface"], who),
            "A lower rate is one on the prompts that were measured, and no guarantee for a single picture. "
            "[Attacks](attacks.md#measured) has rates on the embedded models; `efface attack` measures them on yours "
            "with controls.",
            "- [Attacks](attacks.md): how a result is made, and each attack.\n"
            "- [Limits](limits.md): what Efface does not protect against.\n"
            "- [Images API](serve.md#threat-model): what a tenant of the service can try.\n"
            "- [Offload, caches, copies](coexistence.md): which changes of a pipeline end a call with an error.",
        ]
    )
