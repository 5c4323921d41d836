"""Sections of the documentation that are made from rows, so that a page says what was measured, and what was not."""

from pathlib import Path

PAGES = Path(__file__).parent.parent / "docs/reference/defenses"


def section(page: Path, heading: str) -> str:
    """Return what stands under a heading "## ..." up to the next one, without empty lines at its ends; "" if none."""
    return _parts(page, heading)[1]


def put(page: Path, heading: str, body: str, *, before: str) -> None:
    """Put a section into a page in place of the one with its heading, or else before another one.

    Raises:
        ValueError: the page has neither of the two headings, or the section would be empty or have headings "## ..." of
            its own.
    """
    if not body.strip() or "\n## " in f"\n{body}":
        raise ValueError(f"a section is one heading and some text below it, got {body[:40]!r} for {heading!r}")
    start, old, rest = _parts(page, heading)
    if not old:
        start, there, rest = page.read_text().partition(f"\n## {before}\n")
        if not there:
            raise ValueError(f"{page.name} has no section {heading!r}, and no {before!r} to put it before")
        rest = there + rest
    page.write_text(f"{start}\n## {heading}\n\n{body.strip()}\n{rest}")


def written(parts: list[str], how: str) -> str:
    """What a section says: what was measured, or that nothing was, and how it is."""
    return "\n\n".join([*(parts or ["Not measured yet."]), how])


def span(values: list[float], digits: int) -> str:
    """Smallest to largest, as pages have it; one number where there is no other."""
    ends = dict.fromkeys(f"{end:.{digits}f}" for end in (min(values), max(values)))
    return " to ".join(ends)


def _parts(page: Path, heading: str) -> tuple[str, str, str]:
    """A page before a section, the section without its heading, and the page behind it; all the page first if none."""
    start, found, after = page.read_text().partition(f"\n## {heading}\n")
    body, another, rest = after.partition("\n## ")
    return start, body.strip("\n") if found else "", another + rest
