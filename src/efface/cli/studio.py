"""`efface studio`: the page of the service on this machine, with one policy and the base model to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .._interrupt import gently
from .errors import told
from .options import NOTHING, ConceptNames, ModelName, Phrases, Settings, load, loads, parse_fields, targets_of
from .output import say


@loads
def studio(
    concept: ConceptNames = None,
    phrase: Phrases = None,
    method: Annotated[str, typer.Option(help="The method, see `efface list erasers`.")] = "eiup",
    set_: Settings = None,
    model: ModelName = "emoji",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port on 127.0.0.1. 0: any free one.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="The largest number of pictures in a batch.")] = 8,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Draw in the browser, with concepts erased and beside the base model. Ends with Ctrl-C and keeps nothing."""
    with told():
        from ..serve.backend import PipelineBackend, native_size
        from ..serve.run import run
        from ..serve.service import Limits, initialise

        targets, fields = targets_of(concept, phrase), parse_fields(set_)
        if not targets:
            raise ValueError(NOTHING)
        entry = {"concepts": targets, "method": method, **fields}
        pipe = load(model, loading)
        with tempfile.TemporaryDirectory(prefix="efface-studio-") as folder:
            service, _ = initialise(Path(folder) / "service")
            service.limits = Limits(rows=batch, drain=1.0)
            service.model, service.sizes = model, [native_size(pipe)]
            backend = PipelineBackend(pipe, service.model, service.sizes)
            for name, policy in (("guarded", {"erase": [entry]}), ("base", {"unguarded": True})):
                backend.check(service.policies.add(name, policy, "studio").policy)
            keys = {name: service.keys.add("studio", name)[1] for name in ("guarded", "base")}

            def ready(taken: int) -> None:
                say(f"Open http://127.0.0.1:{taken}/studio#key={keys['guarded']}&other={keys['base']}")
                say("The address holds the keys of this session. Ctrl-C ends it.")

            gently()
            code = run(service, backend, "127.0.0.1", port, None, studio=True, ready=ready)
    raise typer.Exit(code)
