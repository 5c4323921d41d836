"""The documentation: links arrive, dependencies have reasons, and the code in it runs."""

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RUN = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*/README.md")])


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Headings as a reader of Markdown turns them into anchors."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_within_the_repository_arrives(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{named(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{named(page)} links to {target}"


@pytest.mark.parametrize("page", RUN, ids=named)
def test_the_code_in_the_doors_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        module = ModuleType("documentation")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
        exec(compile(block, named(page), "exec"), vars(module))


def test_the_readme_begins_with_the_two_commands() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line and not line.startswith("```")]
    assert lines[0] == "# Molehunt"
    assert [line.split("#")[0].strip() for line in lines[1:3]] == ["make play", "make test"]


def test_every_dependency_has_its_reason_and_no_reason_lacks_its_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=~! ;]", d)[0] for d in listed}
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", (ROOT / "docs/extend/dependencies.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == names
    assert all(len(reason) > 4 for _, reason in rows)
