"""The picture of how a probability came about."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from molehunt.charts.odds import waterfall
from molehunt.figures import SAID
from molehunt.findings import Verdict


def verdict(**details: Any) -> Verdict:
    return Verdict(p=0.9, q=torch.full((4,), 0.25), details=details)


def told(**raised: float) -> Verdict:
    return verdict(log_odds={"start": -2.0, "raised": raised})


def test_its_words_say_what_each_defense_adds_the_largest_first() -> None:
    picture = waterfall(told(abs=0.5, neural_cleanse=3.0, mntd=0.0))
    assert picture is not None
    assert picture.alt == (
        "Log-odds of −2 to begin with; neural_cleanse adds 3, abs adds 0.5; together 1.5, a probability of 0.82 before "
        "it is cut"
    )


def test_every_bar_begins_where_the_last_one_ended() -> None:
    picture = waterfall(told(abs=1.5, strip=1.5))
    assert picture is not None
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)
    color = np.array([int(SAID[i : i + 2], 16) for i in (1, 3, 5)])
    blue = np.abs(pixels - color).sum(-1) < 40
    blue[: picture.height // 6] = False  # the key
    rows = np.flatnonzero(blue.any(1))
    first, last = np.flatnonzero(blue[rows[0] + 2]), np.flatnonzero(blue[rows[-1] - 2])
    assert abs(int(first.max()) - int(last.min())) <= 2
    assert abs(len(first) - len(last)) <= 3


def test_there_is_none_where_no_weights_were_learned() -> None:
    assert waterfall(verdict()) is None
    assert waterfall(verdict(log_odds={"start": None, "raised": {}})) is None
    assert waterfall(verdict(log_odds={"start": 1.0, "raised": {"abs": "much"}})) is None


def test_the_name_of_a_plug_in_is_text_and_no_formula() -> None:
    picture = waterfall(told(**{"mine:A$B$\u202eC": 1.0}))
    assert picture is not None
    assert "mine:A$B$" in picture.alt
    assert "\u202e" not in picture.alt
