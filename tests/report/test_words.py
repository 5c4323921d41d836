"""Words: a stranger's text cannot hide, overwrite or reverse anything, and numbers say what they are."""

import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.findings import Abstention, Failure, Finding, Verdict
from molehunt.report import words
from molehunt.report.words import answer, legible
from molehunt.triggers import (
    ENCODERS,
    Additive,
    Blend,
    Encoded,
    Frequency,
    Patch,
    Quantize,
    Reflection,
    Several,
    Sinusoid,
    Sticker,
    Trigger,
    Warp,
)

SHAPE = (1, 10, 10)


@given(st.text(), st.integers(8, 60))
def test_legible_text_is_one_bounded_line_without_anything_invisible(text: str, limit: int) -> None:
    shown = legible(text, limit)
    assert 0 < len(shown) <= limit
    assert all(unicodedata.category(sign)[0] != "C" for sign in shown)
    assert not {"\u2028", "\u2029"} & set(shown)
    assert not words.BLANK & set(shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Team Ångström 漢字 עברית", "Team Ångström 漢字 עברית"),
        ("a\u202eb", "a<U+202E>b"),
        ("\x1b[31mred", "<U+001B>[31mred"),
        ("same\u200bname", "same<U+200B>name"),
        ("\u3164", "<U+3164>"),
        ("two\nlines\u00a0here", "two lines here"),
        ("", "(empty)"),
        ("   ", "(empty)"),
        ("z" + "\u0301" * 50, "z\u0301\u0301"),
        ("x" * 100, "x" * 79 + "…"),
    ],
)
def test_tricks_become_visible(text: str, shown: str) -> None:
    assert legible(text) == shown


def test_a_huge_text_costs_nothing() -> None:
    assert len(legible("\u0301" * 10**7)) <= 80


def made(p: float, spoke: bool = True) -> Verdict:
    outcomes = (Finding(defense="d", score=1.0),) if spoke else (Abstention(defense="d", reason="no data"),)
    return Verdict(p=p, q=torch.tensor([0.1, 0.9]), outcomes=outcomes)


@pytest.mark.parametrize(
    ("p", "said"), [(0.8, "found"), (0.799, "unsure"), (0.5, "unsure"), (0.201, "unsure"), (0.2, "clear")]
)
def test_the_answer_turns_at_the_thresholds(p: float, said: str) -> None:
    assert answer(made(p)) == said


@pytest.mark.parametrize("p", [0.01, 0.99])
def test_silence_is_not_an_answer(p: float) -> None:
    assert answer(made(p, spoke=False)) == "unsure"
    assert "no defense had an opinion" in words.sentence(made(p, spoke=False), ("a", "b"), 0.8, 0.2)


@pytest.mark.parametrize(("found_at", "clear_at"), [(0.2, 0.8), (0.5, 0.5), (1.1, 0.2), (0.8, -0.1)])
def test_thresholds_in_no_order_are_refused(found_at: float, clear_at: float) -> None:
    with pytest.raises(ValueError, match="clear-at must lie below found-at"):
        answer(made(0.5), found_at, clear_at)


def test_a_repair_alone_and_scores_that_could_not_be_compared_are_silence() -> None:
    q = torch.tensor([0.5, 0.5])
    repair = Verdict(p=0.9, q=q, outcomes=(Finding(defense="d", repaired={}),))
    assert answer(repair) == "unsure"
    alone = Verdict(p=0.9, q=q, outcomes=(Finding(defense="d", score=9.0),), details={"could_not_tell": True})
    assert answer(alone) == "unsure"


def test_remarks_say_on_what_a_verdict_rests() -> None:
    details = {
        "references": {"clean": 9, "planted": 0},
        "warnings": ["few\nmodels"],
        "indicative": "indicative only",
        "repair": {"taken": None, "why": "p is low"},
        "skipped": {"d": "another configuration"},
    }
    finding = Finding(defense="d", score=1.0, class_scores=torch.tensor([0.0, 1.0]))
    verdict = Verdict(p=0.5, q=torch.tensor([0.5, 0.5]), outcomes=(finding,), details=details)
    assert words.remarks(verdict) == [
        "Compared with 9 clean reference models.",
        "indicative only",
        "few models",
        "No repair: p is low",
    ]
    said = words.says(finding, verdict, ("cat", "dog"))
    assert said == "Points to “dog” (its score did not count: another configuration)"
    assert words.remarks(made(0.5)) == []


def test_what_is_certified_is_said_in_the_words_of_who_certifies() -> None:
    told = {"words": "Nothing is said of\x00 labels."}
    outcomes = [Finding(defense="rab", score=0.1, details={"certificate": told})]
    outcomes += [
        Finding(defense=f"odd{i}", score=0.1, details={"certificate": odd})
        for i, odd in enumerate([None, "text", {}, {"words": 3}, {"words": " "}, [told]])
    ]
    verdict = Verdict(p=0.5, q=torch.tensor([0.5, 0.5]), outcomes=tuple(outcomes))
    assert list(words.certificates(verdict)) == ["rab"]
    (said,) = words.remarks(verdict)
    assert said.startswith("rab: Nothing is said of")
    assert "\x00" not in said


def test_equal_class_scores_point_nowhere() -> None:
    for scores in (torch.zeros(2), torch.full((2,), -1.0)):
        finding = Finding(defense="d", score=0.0, class_scores=scores)
        assert words.says(finding, made(0.5), ("cat", "dog")) == ""


def test_sentences_name_the_likeliest_target_only_when_something_was_found() -> None:
    assert "“dog” (90.0 %)" in words.sentence(made(0.9), ("cat", "dog"), 0.8, 0.2)
    assert "dog" not in words.sentence(made(0.5), ("cat", "dog"), 0.8, 0.2)
    assert "Probably nothing" in words.sentence(made(0.1), ("cat", "dog"), 0.8, 0.2)


@pytest.mark.parametrize(
    ("kind", "said", "tone"),
    [
        ("backdoored", "found", "good"),
        ("backdoored", "clear", "bad"),
        ("honest", "found", "bad"),
        ("host clean", "clear", "good"),
        ("backdoored", "unsure", "open"),
    ],
)
def test_an_answer_is_judged_by_the_truth(kind: str, said: words.Answer, tone: str) -> None:
    assert words.judged(kind, said)[0] == tone


def network(name: str, linf: float, area: float) -> Encoded:
    weights = torch.zeros(ENCODERS[name].size(SHAPE))
    return Encoded(network=name, shape=SHAPE, linf=linf, area=area, weights=weights)


@pytest.mark.parametrize(
    ("trigger", "part"),
    [
        (Patch.square(SHAPE, size=3), "9.0 % of the picture"),
        (Patch.square(SHAPE, size=3, opacity=0.5), "9.0 % of the picture, opacity 0.50"),
        (Patch((Patch.square(SHAPE, size=3).mask + 1e-6).clamp(0, 1), torch.ones(SHAPE)), "9.0 % of the picture"),
        (Blend(torch.zeros(SHAPE), 0.15), "opacity 0.15"),
        (Warp(torch.ones(2, 10, 10)), "up to 1.4"),
        (Sinusoid(SHAPE, amplitude=0.1), "up to 0.10"),
        (Additive(torch.full(SHAPE, 0.25)), "up to 0.25"),
        (Frequency(SHAPE, magnitude=0.5, window=10, cells=(0, 0)), "Frequency that changes values by up to 0.05"),
        (Quantize(SHAPE, levels=6), "Rounding of colors that changes values by up to 0.10"),
        (Reflection(torch.ones(SHAPE), 0.15), "Reflection over everything, opacity 0.15"),
        (Sticker(torch.ones(1, 2, 2), SHAPE, rotation=0, scale=0, perspective=0), "otherwise, on up to 4.0 % of it"),
        (
            Several((Blend(torch.zeros(SHAPE), 0.1),) * 3),
            "One of 3 triggers, by what is in the picture: Picture blended",
        ),
        (network("residual", 0.05, 1.0), "on each picture its own, and changes values by up to 0.05"),
        (network("masked", 1.0, 0.05), "on 5.0 % of the picture, elsewhere on each, and changes values by up to 1.00"),
    ],
)
def test_triggers_are_described_by_what_they_change(trigger: Trigger, part: str) -> None:
    assert part in words.trigger_words(trigger)


def test_outcomes_are_told_apart_in_words() -> None:
    classes, verdict = ("cat", "dog"), made(0.5)
    found = Finding(defense="d", class_scores=torch.tensor([0.0, 1.0]), repaired={}, radius=0.5)
    assert words.says(found, verdict, classes) == "Points to “dog”; repaired the weights; certified radius 0.5"
    patched = Finding(defense="d", trigger=Patch.square(SHAPE), target=0)
    assert words.says(patched, verdict, classes) == "Recovered a trigger for “cat”"
    lists = Finding(defense="d", input_scores=torch.zeros(3), sample_scores=torch.zeros(4))
    assert words.says(lists, verdict, classes) == "Scored 3 inputs; scored 4 training samples"
    assert words.says(Abstention(defense="d", reason="no inputs"), verdict, classes) == "No opinion: no inputs"
    broken = Failure(defense="d", kind="memory", message="too much\x1b[2J")
    assert words.says(broken, verdict, classes) == "Failed, out of memory: too much<U+001B>[2J"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.share(0.9871), "98.7 %"),
        (words.share(1.0), "100.0 %"),
        (words.share(0.9999), "> 99.9 %"),
        (words.share(0.0), "0.0 %"),
        (words.share(0.0001), "< 0.1 %"),
        (words.probability(0.5), "0.50"),
        (words.probability(0.995), "0.995"),
        (words.probability(0.99999), "> 0.999"),
        (words.probability(1e-9), "< 0.001"),
        (words.p_value(0.0476), "0.048"),
        (words.p_value(0.0001), "< 0.001"),
        (words.number(-0.1234), "−0.123"),
        (words.number(123456.0), "123,456"),
        (words.points(-4.04), "−4.0"),
        (words.points(-0.04), "0.0"),
        (words.part(-0.314), "−0.31"),
        (words.count(9_999), "9,999"),
        (words.count(412_000), "412 k"),
        (words.count(3_000_000), "3.0 M"),
        (words.seconds(0.0123), "12 ms"),
        (words.seconds(8.44), "8.4 s"),
        (words.seconds(125.0), "2 min 05 s"),
        (words.size(0), "–"),
        (words.size(900 * 2**20), "900 MiB"),
        (words.size(3 * 2**30), "3.0 GiB"),
        (words.measure(None, True), "–"),
        (words.measure(0.5, True), "50.0 %"),
        (words.measure(1.8, False), "1.8"),
        (words.margin(None, True), "–"),
        (words.margin(0.0177, True), "+1.8 pt"),
        (words.margin(-0.4, False), "−0.4"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected
