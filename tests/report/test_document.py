"""The JSON of a scan: complete, plain, and the same answer as everywhere else."""

import dataclasses
import json
import math
from pathlib import Path

import made_up
import pytest
import torch

from molehunt.report import scan_json


def test_it_is_plain_json_and_says_what_the_verdict_says() -> None:
    document = json.loads(json.dumps(scan_json(made_up.scan(0.97)), allow_nan=False))
    assert document["format"] == "molehunt-scan-1"
    assert document["answer"] == "found"
    assert document["p"] == 0.97
    assert document["target"] == {"class": 7, "name": "7"}
    assert document["trigger"]["kind"] == "patch"
    assert sum(document["q"]) == pytest.approx(1.0, abs=1e-5)
    assert document["accuracy"] == {"before": 0.987, "after": 0.981}


def test_every_defense_is_there_with_its_kind_of_outcome() -> None:
    document = scan_json(made_up.scan())
    kinds = {entry["defense"]: entry["outcome"] for entry in document["defenses"]}
    assert kinds == {
        "neural_cleanse": "finding",
        "strip": "finding",
        "fine_pruning": "finding",
        "spectral_signatures": "abstention",
        "sentinet": "failure",
    }
    first = document["defenses"][0]
    assert first["p_value"] == 0.0476
    assert first["cost"] == {"seconds": 8.4, "forward": 412_000, "backward": 61_440, "peak_bytes": 900 * 2**20}
    assert document["defenses"][2]["repaired"]


def test_details_become_plain_json() -> None:
    verdict = dataclasses.replace(
        made_up.scan().verdict,
        details={"norms": torch.zeros(2, 3), "bad": math.nan, "list": (1, None, {"deep": Path("x")})},
    )
    document = scan_json(dataclasses.replace(made_up.scan(), verdict=verdict))
    assert document["details"] == {"norms": {"shape": [2, 3]}, "bad": None, "list": [1, None, {"deep": "x"}]}


def test_what_is_absent_is_null_and_not_zero() -> None:
    document = scan_json(made_up.scan(0.1, recovered=False, silent=True))
    assert document["answer"] == "unsure"
    assert document["target"] is None
    assert document["trigger"] is None
    assert document["attack_success"] is None
