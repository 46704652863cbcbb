"""The files of `deploy/`: their form, by schema where a package has one, and that they fit the service."""

from __future__ import annotations

import configparser
import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from efface.cli import app as cli
from efface.cli import serve
from efface.serve import images, own
from efface.serve.service import DATABASE_FILE, PEPPER_FILE, Limits

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")))
PATHS = {route.path for route in (*images.routes.routes, *own.routes.routes)}  # type: ignore[attr-defined]


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """What `efface serve` makes of these arguments. Unknown ones raise."""
    group: Any = typer.main.get_command(cli)
    words = ["serve", *arguments]
    context = None
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    context = group.make_context(group.name, words)
    found: dict[str, Any] = context.params
    return found


def test_the_command_has_the_bounds_of_the_service() -> None:
    assert serve._limits(serve.DEFAULTS) == Limits()
    assert serve._limits(serve.DEFAULTS | {"keep": 0.5}).keep == 1_800
    with pytest.raises(ValueError, match="--keep"):
        serve._limits(serve.DEFAULTS | {"keep": 0.0})


# ---------------------------------------------------------------- systemd


def unit() -> configparser.ConfigParser:
    made = configparser.ConfigParser(interpolation=None)
    made.optionxform = str  # type: ignore[assignment,method-assign]
    made.read(DEPLOY / "efface.service", "utf-8")
    return made


def test_the_unit_starts_this_service_and_waits_for_its_drain() -> None:
    service = unit()["Service"]
    binary, *arguments = shlex.split(service["ExecStart"])
    assert binary.endswith("/efface") and arguments[0] == "serve"
    given = parsed(arguments[1:])
    assert given["drain"] <= Limits().drain and not given["everywhere"]
    assert int(service["TimeoutStopSec"]) > 2 * given["drain"]  # for the drain, and for the batch after it
    assert f"/var/lib/{service['StateDirectory']}" in str(given["folder"]) and service["Restart"] == "on-failure"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "efface.service").read_text("utf-8")
    for name, more in {"efface": "", "broken": "\n[Service]\nProtectEverything=true\n"}.items():
        path = tmp_path / f"{name}.service"
        path.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text) + more, "utf-8")
        command = ["systemd-analyze", "verify", "--man=no", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        told = [line for line in done.stderr.splitlines() if f"{name}.service" in line]
        assert bool(told) == bool(more), done.stderr


# ---------------------------------------------------------------- container


def instructions() -> list[tuple[str, str]]:
    lines = (DEPLOY / "Containerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
    words = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    return [(word, rest) for word, rest in words]


def test_the_container_has_what_the_service_needs_and_runs_without_rights() -> None:
    found = dict(instructions())
    assert {word for word, _ in instructions()} <= {
        "FROM", "ARG", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (extras,) = re.findall(r'"/src\[([\w,-]+)\]"', found["RUN"])
    assert {"serve", "postgres"} <= set(extras.split(",")) <= set(project["optional-dependencies"])
    assert found["USER"] == "10001" and json.loads(found["ENTRYPOINT"]) == ["efface", "serve"]
    given = parsed(json.loads(found["CMD"]))
    assert (given["host"], given["everywhere"]) == ("0.0.0.0", True)
    assert f"{given['port']} {given['metrics_port']}" == found["EXPOSE"]
    assert str(given["folder"]).startswith(found["VOLUME"])
    (path,) = re.findall(r"http://127.0.0.1:8000(/\w+)", found["HEALTHCHECK"])
    assert path in PATHS
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert project["readme"] in copied and "constraints.txt" in copied
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text("utf-8").split("\n")
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == set(copied)


# ---------------------------------------------------------------- Kubernetes


@pytest.mark.long
def test_kubernetes_knows_every_field_of_the_manifests() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for manifest in MANIFESTS:
        validate.validate(manifest, validate.latest_version(), strict=True)
    broken = copy.deepcopy(MANIFESTS[0])
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, validate.latest_version(), strict=True)


def test_the_manifests_fit_the_service() -> None:
    kinds = {each["kind"]: each["spec"] for each in MANIFESTS}
    assert len(kinds) == len(MANIFESTS) == 4
    pod = kinds["Deployment"]["template"]["spec"]
    (container,) = pod["containers"]
    given = parsed(container["args"])
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": given["port"], "metrics": given["metrics_port"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in PATHS and asked["port"] in ports
    assert container["readinessProbe"]["timeoutSeconds"] > 5  # the database has 5 s to answer
    assert pod["terminationGracePeriodSeconds"] > 2 * given["drain"]
    labels = kinds["Deployment"]["template"]["metadata"]["labels"].items()
    selectors = [kinds["Deployment"]["selector"]["matchLabels"], kinds["Service"]["selector"]]
    selectors += [kinds["PodDisruptionBudget"]["selector"]["matchLabels"]]
    selectors += [kinds["NetworkPolicy"]["podSelector"]["matchLabels"]]
    assert all(each.items() <= labels for each in selectors)
    assert {port["port"] for rule in kinds["NetworkPolicy"]["ingress"] for port in rule["ports"]} == {*ports.values()}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    pepper = mounts[f"{given['folder']}/{PEPPER_FILE}"]
    assert pepper["readOnly"] and pepper["subPath"] == PEPPER_FILE  # a file, not a link to one
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert container["env"][0]["name"] == "EFFACE_DATABASE"  # several replicas share no SQLite file
    assert DATABASE_FILE not in str(MANIFESTS)
    assert not pod["enableServiceLinks"] and not pod["automountServiceAccountToken"]
    rights = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] and not rights["allowPrivilegeEscalation"]
    assert rights["readOnlyRootFilesystem"] and rights["capabilities"] == {"drop": ["ALL"]}
