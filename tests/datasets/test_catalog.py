import re
from pathlib import Path

import pytest

from molehunt.datasets import DATASETS
from molehunt.datasets.catalog import dataset
from molehunt.datasets.sources import Debian, Npm, Official
from molehunt.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "data.md").read_text()


@pytest.mark.parametrize("name", DATASETS)
def test_an_entry_is_complete(name: str) -> None:
    data = dataset(name)
    assert data.name == name
    assert len(set(data.classes)) == len(data.classes) == {"gtsrb": 43}.get(name, 10)
    # Every part has its sum, or (gtsrb) none has.
    assert list(data.sums) in (list(data.rows), [])
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in data.sums.values())
    assert all(source.address.endswith("/") for source in data.sources if isinstance(source, Official))


@pytest.mark.parametrize("name", DATASETS)
def test_the_page_tells_the_same(name: str) -> None:
    data = dataset(name)
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` | {data.shape[0]}x"))
    assert "x".join(map(str, data.shape)) in line
    for count in data.rows.values():
        assert f"{count:,}".replace(",", " ") in line
    for source in data.sources:
        if isinstance(source, Npm | Debian):
            assert source.package.partition("@")[0] in line
    for part, value in data.sums.items():
        assert f"| `{name}` | {part} | `{value}` |" in PAGE
    (defaults,) = (line for line in PAGE.splitlines() if f"`{name}`" in line and f"| `{TASKS[name].network}` |" in line)
    assert ("shifted" in defaults, "shifted, mirrored" in defaults) == (
        TASKS[name].augment != "none",
        TASKS[name].augment == "flip_crop",
    )


def test_the_snippets_of_the_page_run() -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "data.md", "exec"), {})
