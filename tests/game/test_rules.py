import re
from dataclasses import asdict
from pathlib import Path

import pytest

from molehunt.defenses import DEFENSES, SpectralSignatures, SuperFineTuning
from molehunt.game.rules import BOARDS, DATA_ONLY, ORDER, ROUNDS, Repair, Weights, get_round


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("I", (0.25, 0.0, 0.0, 0.75)),
        ("II", (0.60, 0.20, 0.20, 0.0)),
        ("III", (0.35, 0.15, 0.35, 0.15)),
        ("IV", (0.70, 0.0, 0.0, 0.30)),
        ("final", (0.40, 0.15, 0.25, 0.20)),
    ],
)
def test_the_rounds_weigh_what_they_are_about(name: str, weights: tuple[float, ...]) -> None:
    w = get_round(name).weights
    assert (w.detection, w.target, w.trigger, w.cleaning) == weights


def test_there_are_five_rounds_and_the_final_counts_double() -> None:
    assert list(ROUNDS) == ["I", "II", "III", "IV", "final"]
    assert [r.counts for r in ROUNDS.values()] == [1, 1, 1, 1, 2]


def test_the_final_plays_every_defense_of_the_other_rounds_and_one_of_its_own() -> None:
    others = {d for name, r in ROUNDS.items() if name != "final" for d in r.defenses}
    assert set(ROUNDS["final"].defenses) == others | {"pair_inversion"} == set(ORDER)


def test_every_built_in_defense_has_a_round() -> None:
    assert set(DEFENSES) <= set(ORDER)


def test_trigger_producers_run_before_those_who_judge_triggers() -> None:
    final = ROUNDS["final"].defenses
    producers = [final.index(d) for d in ("abs", "neural_cleanse")]
    judges = [final.index(d) for d in ("strip", "sentinet", "unlearning", "neuron_pruning", "fine_pruning")]
    assert max(producers) < min(judges)


def test_what_needs_the_training_set_plays_on_the_data_board_alone() -> None:
    assert set(get_round("II").on_board("weights")) == {"strip", "abs"}
    assert set(get_round("II").on_board("data")) == {"strip", "abs", "spectral_signatures"}
    assert {"spectral_signatures", "gradient_shaping", "rab"} == DATA_ONLY
    with pytest.raises(ValueError, match="data"):
        get_round("II").on_board("wood")


def test_an_unknown_round_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'V'; known: I, II, III, IV, final"):
        get_round("V")


@pytest.mark.parametrize("values", [(0.5, 0.5, 0.5, 0.0), (1.2, -0.2, 0.0, 0.0)])
def test_weights_are_shares(values: tuple[float, float, float, float]) -> None:
    detection, target, trigger, cleaning = values
    with pytest.raises(ValueError, match="sum to 1"):
        Weights(detection=detection, target=target, trigger=trigger, cleaning=cleaning)


def test_the_docs_list_the_same_rounds() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/run/scoring.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\w -]+) \| ([\d. |]+) \|$", page, re.MULTILINE)
    listed = [(name, title, [float(v) for v in values.split("|")]) for name, title, values in rows]
    assert listed == [
        (r.name, r.title, [w.detection, w.target, w.trigger, w.cleaning, r.counts])
        for r in ROUNDS.values()
        for w in [r.weights]
    ]


def test_removals_get_what_their_round_gives_them() -> None:
    for board in BOARDS:
        full, short = (ROUNDS[name].make(board, DEFENSES) for name in ("I", "final"))
        # Whoever runs a removal outside of a game runs it as the round about removals does.
        assert full == {name: DEFENSES[name]() for name in full}
        for name, repair in ROUNDS["final"].repairs.items():
            if name in short:
                said = asdict(short[name])  # type: ignore[call-overload]  # defenses are dataclasses
                rate = said["max1" if name == "super_fine_tuning" else "lr"]
                assert (said["steps"], said["batch"], rate) == (repair.steps, repair.batch, repair.lr)
                assert repair.steps <= ROUNDS["III" if name == "unlearning" else "I"].repairs[name].steps
    assert ROUNDS["final"].make("weights", DEFENSES)["super_fine_tuning"] != SuperFineTuning()


def test_nobody_trains_again_where_a_cleaned_model_earns_nothing() -> None:
    for played in ROUNDS.values():
        made = played.make("data", DEFENSES).get("spectral_signatures")
        assert made is None or isinstance(made, SpectralSignatures)
        assert made is None or made.retrain == (played.weights.cleaning > 0)
    assert not ROUNDS["II"].make("data", DEFENSES)["spectral_signatures"].retrain  # type: ignore[attr-defined]


def test_only_removals_of_the_round_have_a_budget() -> None:
    for played in ROUNDS.values():
        assert set(played.repairs) <= set(played.defenses)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}])
def test_a_repair_without_a_budget_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs steps, images and a rate above zero"):
        Repair(**{"steps": 1, "batch": 1, "lr": 0.1} | wrong)  # type: ignore[arg-type]
