"""An audit for machines: JUnit XML for CI, and an unsigned in-toto statement."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping
from typing import Any

from .verdict import EXCEEDED, MEASURED, MET, NOT_JUDGED

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(facts: Mapping[str, Any]) -> str:
    """The audit as JUnit XML, a test case per concept.

    Not judged is an error, because a skipped case would fail no build. Measured without a limit is skipped, because it
    is no pass.
    """
    cases, lost = facts["concepts"], _lost(facts)
    outcomes = [each["verdict"]["outcome"] for each in cases]
    outcomes += [EXCEEDED] * len(facts["regressions"]) + [NOT_JUDGED] * len(lost)
    counts = {
        "tests": str(len(outcomes)),
        "failures": str(outcomes.count(EXCEEDED)),
        "errors": str(outcomes.count(NOT_JUDGED)),
        "skipped": str(outcomes.count(MEASURED)),
        "time": f"{facts['seconds']:.3f}",
    }
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": _text(f"efface audit {facts['model']['name']}"), **counts})
    for each in cases:
        case, verdict = _case(suite, each["concept"]), each["verdict"]
        numbers = {"pictures": each["n"], "prompts": each["prompts"], "upper": verdict["bound"]}
        numbers |= {"rate": each["rate"]["rate"], "by the detector, upper": each["upper"]} if each["n"] else {}
        inner = ET.SubElement(case, "properties")
        for name, value in numbers.items():
            ET.SubElement(inner, "property", {"name": name, "value": "unknown" if value is None else f"{value:g}"})
        if verdict["outcome"] == EXCEEDED:
            ET.SubElement(case, "failure", {"message": _text(verdict["why"]), "type": "Exceeded"})
        elif verdict["outcome"] == NOT_JUDGED:
            why = _text("; ".join(verdict["reasons"]))
            ET.SubElement(case, "error", {"message": why, "type": "NotJudged"})
        elif verdict["outcome"] == MEASURED:
            ET.SubElement(case, "skipped", {"message": "There is no limit, so this is no pass."})
        ET.SubElement(case, "system-out").text = _text("\n".join(each["words"]))
    for each in facts["regressions"]:
        case = _case(suite, f"{each['concept']}, regression")
        ET.SubElement(case, "failure", {"message": _text(each["words"]), "type": "Regression"})
    for name in lost:
        case = _case(suite, f"{name}, regression")
        why = "Nothing of it could be compared with the earlier audit."
        ET.SubElement(case, "error", {"message": why, "type": "NotJudged"})
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _lost(facts: Mapping[str, Any]) -> list[str]:
    """The concepts of which nothing could be compared with an earlier audit."""
    return list((facts["since"] or {}).get("lost", []))


def _case(suite: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", {"name": _text(name), "classname": "efface.audit", "time": "0"})


def _text(value: str) -> str:
    """A text without the characters that XML cannot hold."""
    return _NO_XML.sub("\ufffd", value)


def statement(
    facts: Mapping[str, Any], digests: Mapping[str, str], evidence: Mapping[str, str], common: Collection[str] = ()
) -> dict[str, Any]:
    """An in-toto Statement v1 with a test result. It is not signed.

    Whoever verifies a statement looks for the digest of any subject. So a file that the base model has too is no
    subject: it would carry this model's result to the base model.

    Args:
        facts: the content of audit.json.
        digests: SHA-256 of the model's files by name.
        evidence: SHA-256 of the audit's own files by name.
        common: the digests of the base model's files.
    """
    files = {facts["model"]["name"]: facts["model"]["digest"]}
    files |= {name: each for name, each in digests.items() if each not in common}
    names: dict[str, list[str]] = {"passedTests": [], "warnedTests": [], "failedTests": []}
    for each in facts["concepts"]:
        outcome = each["verdict"]["outcome"]
        where = {MET: "passedTests", MEASURED: "warnedTests"}.get(outcome, "failedTests")
        names[where].append(each["concept"] + (", not judged" if outcome == NOT_JUDGED else ""))
    names["failedTests"] += [f"{each['concept']}, regression" for each in facts["regressions"]]
    names["failedTests"] += [f"{name}, regression not judged" for name in _lost(facts)]
    failed, warned = names["failedTests"], names["warnedTests"]
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": each}} for name, each in files.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "result": "FAILED" if failed else "WARNED" if warned else "PASSED",
            "configuration": [{"name": name, "digest": {"sha256": each}} for name, each in evidence.items()],
            **names,
        },
    }
