"""`efface serve`: an images API whose keys carry policies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import checks
from .._interrupt import gently
from .errors import told
from .options import AsJson, ModelName, load, loads, shared
from .output import print_table, say

if TYPE_CHECKING:
    from ..serve.service import Limits, Service

serve_app = typer.Typer(help="Serve an images API in which each key carries a policy.", no_args_is_help=True)
key_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
policy_app = typer.Typer(help="Store and list policies.", no_args_is_help=True)
serve_app.add_typer(key_app, name="key")
serve_app.add_typer(policy_app, name="policy")

Folder = Annotated[Path, typer.Argument(help="The folder of the service, made by `efface serve init`.")]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="EFFACE_DATABASE",
        help="The URL of a PostgreSQL or SQLite database. Default: an SQLite file in the folder.",
    ),
]


HOSTING: dict[str, Any] = {
    "name": Annotated[str | None, typer.Option(help="The name of the model in requests. Default: --model.")],
    "host": Annotated[str, typer.Option(help="The address to listen on.")],
    "everywhere": Annotated[bool, typer.Option("--everywhere", help="Allow addresses beyond this machine.")],
    "deltas": Annotated[
        Path | None, typer.Option(help="The folder of the deltas that policies name. Default: policies have none.")
    ],
    "batch": Annotated[int, typer.Option(min=1, help="The largest number of pictures in a batch.")],
    "queue": Annotated[int, typer.Option(min=1, help="The largest number of live jobs.")],
    "tenant_queue": Annotated[int, typer.Option(min=1, help="The largest number of live jobs of a tenant.")],
    "keep": Annotated[float, typer.Option(help="Hours that jobs and their pictures are kept after they have ended.")],
    "drain": Annotated[float, typer.Option(help="Seconds for accepted jobs after SIGTERM.")],
    "stall": Annotated[float, typer.Option(help="Seconds without a step after which a worker counts as stalled.")],
    "database": DatabaseUrl,
}
"""The options of every command that serves."""
DEFAULTS: dict[str, Any] = {
    "name": None, "host": "127.0.0.1", "everywhere": False, "deltas": None, "batch": 8, "queue": 1_000,
    "tenant_queue": 200, "keep": 24.0, "drain": 60.0, "stall": 600.0, "database": None,
}  # fmt: skip
hosts = shared("hosting", HOSTING, DEFAULTS)


def _limits(hosting: Mapping[str, Any]) -> Limits:
    from ..serve.service import Limits

    same = {name: hosting[name] for name in ("queue", "drain", "stall")}
    keep = checks.number("--keep", hosting["keep"], 0, above=True) * 3_600
    return Limits(rows=hosting["batch"], tenant=hosting["tenant_queue"], keep=keep, **same)


def _folder(hosting: Mapping[str, Any]) -> Path | None:
    """The absolute path of --deltas. Raises ValueError unless it is a folder."""
    if hosting["deltas"] is None:
        return None
    path = checks.path("--deltas", hosting["deltas"]).absolute()
    if not path.is_dir():
        raise ValueError(checks.refusal("a folder as --deltas", str(hosting["deltas"]), "Name the folder."))
    return path


def _opened(folder: Path, database: str | None, **options: Any) -> Service:
    from ..serve.service import opened

    return opened(checks.path("FOLDER", folder), database, **options)


@serve_app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.")], database: DatabaseUrl = None) -> None:
    """Make the secret and the tables of a service, and print its first admin key."""
    with told():
        from ..serve.service import initialise

        service, key = initialise(checks.path("FOLDER", folder), database)
        service.database.close()
        say(f"Made a service in {folder}. Its admin key, which is not shown again:")
        typer.echo(key)


@serve_app.command()
@loads
@hosts
def run(
    folder: Folder,
    model: ModelName = "emoji",
    size: Annotated[
        list[str] | None,
        typer.Option(help="A size that requests may ask for, WxH; may be repeated. Default: the model's."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port of the API. 0: any free one.")] = 8000,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="The port of the metrics. 0: any free one.")
    ] = 9000,
    studio: Annotated[
        bool, typer.Option("--studio", help="Also serve a page at /studio that draws with a key.")
    ] = False,
    *,
    hosting: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> None:
    """Serve until Ctrl-C or SIGTERM, which lets accepted jobs finish."""
    with told():
        from ..serve.backend import PipelineBackend, native_size, parse_size
        from ..serve.run import check_host
        from ..serve.run import run as serve

        host, everywhere = hosting["host"], hosting["everywhere"]
        check_host(host, everywhere)
        deltas = _folder(hosting)
        service = _opened(folder, hosting["database"], limits=_limits(hosting))
        sizes = [parse_size(each) for each in size or ()]
        pipe = load(model, loading)
        service.model, service.sizes = hosting["name"] or model, sizes or [native_size(pipe)]
        gently()
        backend = PipelineBackend(pipe, service.model, service.sizes, deltas)
        code = serve(service, backend, host, port, metrics_port, everywhere, studio=studio)
    raise typer.Exit(code)


@serve_app.command()
@loads
@hosts
def ray(
    folder: Folder,
    size: Annotated[list[str], typer.Option(help="A size that requests may ask for, WxH; may be repeated.")],
    model: ModelName = "emoji",
    address: Annotated[
        str, typer.Option(help='"local" starts a cluster on this machine. Or the address of one, such as auto.')
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Replicas that draw.")] = 1,
    apis: Annotated[int, typer.Option(min=1, help="Replicas that answer requests.")] = 1,
    cpus: Annotated[float, typer.Option(help="CPUs of each replica that draws, as Ray counts them.")] = 0.5,
    gpus: Annotated[float, typer.Option(help="GPUs of each replica that draws.")] = 0.0,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The port of the API.")] = 8000,
    metrics_port: Annotated[
        int, typer.Option(min=1, max=65_000, help="The first port for metrics; each replica takes the next free one.")
    ] = 9000,
    *,
    hosting: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> None:
    """Serve on Ray Serve, with several replicas, until Ctrl-C or SIGTERM."""
    with told():
        from ..serve import cluster
        from ..serve.backend import parse_size

        deltas = _folder(hosting)
        every = cluster.Hosting(
            str(checks.path("FOLDER", folder).absolute()), model, [parse_size(each) for each in size],
            hosting["name"] or model, hosting["database"], loading, _limits(hosting), workers, apis, cpus, gpus,
            metrics_port, None if deltas is None else str(deltas),
        )  # fmt: skip
        made = cluster.Host(every, address, hosting["host"], port, hosting["everywhere"])
        gently()
        code = cluster.host(made)
    raise typer.Exit(code)


def _entry(text: str | None) -> tuple[int, str] | None:
    """Number and hash of --expect."""
    if text is None:
        return None
    number, _, hash_ = text.partition(":")
    if not (number.isascii() and number.isdecimal() and len(number) < 19 and len(hash_) == 64 and hash_.isascii()):
        raise ValueError(checks.refusal("NUMBER:HASH as --expect", text, "Copy it from `efface serve audit`."))
    return int(number), hash_


@serve_app.command()
def audit(
    folder: Folder,
    drop_older: Annotated[
        float | None, typer.Option(help="Delete entries older than so many days. The rest can still be checked.")
    ] = None,
    expect: Annotated[
        str | None, typer.Option(help="NUMBER:HASH of an earlier last entry, which shows whether the end was cut off.")
    ] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Check the chain of the audit log, and show its latest entries."""
    with told():
        earlier = _entry(expect)
        service = _opened(folder, database)
        dropped = 0 if drop_older is None else service.audit.drop(drop_older)
        n, fault = service.audit.verify()
        if not fault and earlier is not None and not service.audit.has(*earlier):
            fault = f"entry {earlier[0]} is not the expected one"
        hash_ = service.audit.last()[1]
        entries = service.audit.entries(20)
        service.database.close()
        if as_json:
            typer.echo(
                json.dumps({"last": n, "hash": hash_, "dropped": dropped, "fault": fault, "latest": entries}, indent=1)
            )
        else:
            for entry in entries:
                say(f"{entry['seq']}  {entry['kind']}  {entry.get('tenant', '')}")
            if drop_older is not None:
                say(f"Dropped {dropped} entries.")
            say(f"{n} is the last entry, {fault or 'the chain holds'}.")
            say(f"Keep {n}:{hash_} elsewhere, for --expect.")
        if fault:
            raise ValueError(f"The audit log is damaged ({fault}). Restore the database from a backup.")


# ---------------------------------------------------------------- keys


@key_app.command("add")
def add_key(
    folder: Folder,
    tenant: Annotated[str, typer.Option(help="The tenant, whose jobs the key can see.")],
    policy: Annotated[str | None, typer.Option(help="The name of a stored policy. Leave it out with --admin.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Make a key that stores policies and draws nothing.")] = False,
    days: Annotated[float | None, typer.Option(help="Days until it expires. Default: never.")] = None,
    rate: Annotated[float | None, typer.Option(help="Cost per second, see docs/serve.md. Default: any.")] = None,
    burst: Annotated[
        float | None, typer.Option(help="Cost that it may spend at one time. Default: 60 seconds of --rate.")
    ] = None,
    database: DatabaseUrl = None,
) -> None:
    """Make a key, and print it once."""
    with told():
        service = _opened(folder, database)
        name, key = service.keys.add(tenant, policy, admin=admin, days=days, rate=rate, burst=burst)
        service.database.close()
        say(f"Made {name} for {tenant}. The key, which is not shown again:")
        typer.echo(key)


@key_app.command("list")
def list_keys(folder: Folder, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the keys, without the keys themselves."""
    with told():
        service = _opened(folder, database)
        found = service.keys.list()
        service.database.close()
        if as_json:
            typer.echo(json.dumps(found, indent=1))
            return
        lines = [
            [k["id"], k["tenant"], k["policy"] or "admin", "revoked" if k["revoked"] is not None else "valid"]
            for k in found
        ]
        print_table(["key", "tenant", "policy", ""], lines, box=None)


@key_app.command("revoke")
def revoke_key(
    folder: Folder, key: Annotated[str, typer.Argument(help="The id of the key.")], database: DatabaseUrl = None
) -> None:
    """Revoke a key. Its next request is refused."""
    with told():
        service = _opened(folder, database)
        service.keys.revoke(key)
        service.database.close()
        say(f"Revoked {key}.")


# ---------------------------------------------------------------- policies


@policy_app.command("add")
def add_policies(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="A YAML file with policies, see docs/guard.md.")],
    database: DatabaseUrl = None,
) -> None:
    """Store the policies of a YAML file as new versions. Equal policies are left alone."""
    with told():
        from .. import guard

        policies = guard.read(file)
        service = _opened(folder, database)
        for name, policy in policies.items():
            entries = {key: value for key, value in policy.as_json().items() if key != "version"}
            stored = service.policies.add(name, entries, "command line")
            say(f"{name}: version {stored.policy.version}, {stored.policy.hash[:12]}")
        service.database.close()


@policy_app.command("list")
def list_policies(folder: Folder, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the latest version of each policy."""
    with told():
        service = _opened(folder, database)
        found = service.policies.list()
        service.database.close()
        if as_json:
            typer.echo(
                json.dumps([{"name": each.name, "hash": each.policy.hash, **each.policy.as_json()} for each in found])
            )
            return
        lines = []
        for each in found:
            erased = ", ".join(concept.name for concept in each.policy.concepts) or "unguarded"
            lines.append([each.name, str(each.policy.version), each.policy.hash[:12], erased])
        print_table(["policy", "version", "hash", "erases"], lines, box=None)
