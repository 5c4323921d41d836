"""A scan for a code host's list of alerts."""

from dataclasses import replace

import pytest
import torch

from molehunt.findings import Failure, Finding, Verdict
from molehunt.report import ScanReport, scan_sarif

CLEANSE = Finding(defense="neural_cleanse", score=1.0)


def report(p: float, **changes: object) -> ScanReport:
    verdict = Verdict(p=p, q=torch.tensor([0.1, 0.9]), outcomes=(CLEANSE,), p_values={"neural_cleanse": 0.1})
    made = ScanReport(
        name="m", task="t", network="n", shape=(1, 8, 8), classes=("cat", "dog"), verdict=verdict,
        versions={"molehunt": "1.2"}, model_sha256="ab" * 32, references_sha256="cd" * 32,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("p", "kind", "level"), [(0.9, "fail", "error"), (0.05, "pass", "none"), (0.5, "open", "none")]
)
def test_only_what_was_found_is_an_alert(p: float, kind: str, level: str) -> None:
    document = scan_sarif(report(p), "models/net.pt")
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    (result,) = run["results"]
    assert (result["kind"], result["level"]) == (kind, level)
    assert run["tool"]["driver"]["version"] == "1.2"
    assert result["ruleId"] == run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"]
    assert result["properties"]["p"] == p
    assert result["properties"]["model_sha256"] == "ab" * 32
    assert result["properties"]["references_sha256"] == "cd" * 32


def test_the_message_is_the_sentence_of_the_report() -> None:
    (result,) = scan_sarif(report(0.9), "m.pt")["runs"][0]["results"]
    assert "very probably hidden" in result["message"]["text"]
    assert "dog" in result["message"]["text"]


def test_the_place_is_a_relative_uri() -> None:
    (result,) = scan_sarif(report(0.9), "my models\\net ü.pt")["runs"][0]["results"]
    (place,) = result["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "my%20models/net%20%C3%BC.pt"


def test_the_same_weights_are_the_same_alert_and_unknown_ones_are_none() -> None:
    (known,) = scan_sarif(report(0.9), "a.pt")["runs"][0]["results"]
    (moved,) = scan_sarif(report(0.95), "b.pt")["runs"][0]["results"]
    assert known["partialFingerprints"] == moved["partialFingerprints"] == {"model/v1": "ab" * 32}
    (other,) = scan_sarif(report(0.9, model_sha256=""), "a.pt")["runs"][0]["results"]
    assert other["partialFingerprints"] == {}
    assert other["properties"]["model_sha256"] is None


def test_a_defense_that_failed_is_a_notification() -> None:
    failed = Failure(defense="abs", kind="memory", message="no room")
    verdict = replace(report(0.5).verdict, outcomes=(CLEANSE, failed))
    (run,) = scan_sarif(report(0.5, verdict=verdict), "m.pt")["runs"]
    (notice,) = run["invocations"][0]["toolExecutionNotifications"]
    assert notice == {"level": "warning", "message": {"text": "abs failed: no room"}}
