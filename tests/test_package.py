"""What an installed package consists of."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "molehunt"


def test_no_file_of_the_package_is_one_that_git_ignores() -> None:
    """The build leaves out whatever .gitignore names, so a pattern too many would lose templates or populations."""
    if not (ROOT / ".git").exists():
        pytest.skip("NOT TESTED, this is no checkout")
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} >= {".py", ".typed", ".json", ".jinja", ".html", ".css"}
    asked = "\n".join(str(path.relative_to(ROOT)) for path in files)
    # 0: some are ignored, 1: none is; --no-index asks about the patterns alone, whatever is tracked already.
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], cwd=ROOT, input=asked, capture_output=True, text=True
    )
    assert done.returncode == 1, f"left out of a wheel: {done.stdout.split()}"
