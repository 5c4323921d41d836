"""A scan as SARIF 2.1.0, the format in which code hosts take what analyzers found."""

import string
from typing import Any

from molehunt.findings import Failure
from molehunt.report.document import scan_json
from molehunt.report.views import ScanReport
from molehunt.report.words import answer, sentence

RULE = "backdoor"
KINDS = {"found": "fail", "clear": "pass", "unsure": "open"}
"""What SARIF calls the answers: of these a host shows the first as an alert."""


PLAIN = frozenset((string.ascii_letters + string.digits + "-._~/").encode())


def scan_sarif(report: ScanReport, place: str) -> dict[str, Any]:
    """Turn a scan into a SARIF document with one result.

    A model that was called clean has a result of the kind `pass`, one that could not be told of the kind `open`, so
    that a document without an alert still says that the model was looked at. A defense that failed is a notification.

    Args:
        report: the scan.
        place: path of the model, relative to the root of the repository that the document is uploaded for.

    Returns:
        JSON values; `runs[0].results[0].properties` has p, q, the target and the hashes.
    """
    verdict = report.verdict
    said = answer(verdict, report.found_at, report.clear_at)
    document = scan_json(report)
    kept = ("p", "q", "classes", "target", "sources", "trigger", "model_sha256", "references_sha256", "command")
    failures = [o for o in verdict.outcomes if isinstance(o, Failure)]
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "Molehunt",
                        "version": report.versions.get("molehunt", ""),
                        "rules": [
                            {
                                "id": RULE,
                                "shortDescription": {"text": "A trained network behaves as if something was hidden."},
                                "fullDescription": {
                                    "text": "Probability that a secret trigger makes the model answer a class of an "
                                    "attacker's choice, from the answers of several defenses beside those on clean "
                                    "models."
                                },
                                "defaultConfiguration": {"level": "error"},
                            }
                        ],
                    }
                },
                "invocations": [
                    {
                        "executionSuccessful": True,
                        "toolExecutionNotifications": [
                            {"level": "warning", "message": {"text": f"{f.defense} failed: {f.message}"}}
                            for f in failures
                        ],
                    }
                ],
                "results": [
                    {
                        "ruleId": RULE,
                        "ruleIndex": 0,
                        "kind": KINDS[said],
                        "level": "error" if said == "found" else "none",
                        "message": {"text": sentence(verdict, report.classes, report.found_at, report.clear_at)},
                        "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(place)}}}],
                        "partialFingerprints": {"model/v1": report.model_sha256} if report.model_sha256 else {},
                        "properties": {name: document[name] for name in kept},
                    }
                ],
            }
        ],
    }


def _uri(place: str) -> str:
    """A path as a relative reference (RFC 3986)."""
    return "".join(chr(b) if b in PLAIN else f"%{b:02X}" for b in place.replace("\\", "/").encode())
