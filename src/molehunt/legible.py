"""Text from strangers, made safe to look at: in a terminal, on a page, in a log. Imports nothing but the library."""

import unicodedata

# Letters and signs that look like nothing at all, although Unicode does not count them as blanks.
BLANK = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0")
MARKS = 2  # combining marks on one letter; no script in a team's name needs more, and a heap of them covers other lines


def legible(text: str, limit: int = 80) -> str:
    """Make a stranger's text safe to look at: one line, bounded, nothing invisible, nothing that turns it around.

    Control signs (with them the escape codes of terminals), direction overrides, joiners and blank letters appear as
    their code, such as U+202E in angle brackets; piles of combining marks are cut. Escaping for HTML is another
    step, done by the page.

    Args:
        text: anything.
        limit: longest answer in characters; what is cut shows as an ellipsis.
    """
    shown: list[str] = []
    marks = 0
    # A little more than the limit is enough, and keeps a name of a megabyte cheap.
    for sign in text[: 4 * limit]:
        kind = unicodedata.category(sign)
        marks = marks + 1 if kind in {"Mn", "Me"} else 0
        if marks > MARKS:
            continue
        if sign in "\t\n\r" or kind == "Zs":
            shown.append(" ")
        elif kind[0] == "C" or kind in {"Zl", "Zp"} or sign in BLANK:
            shown.append(f"<U+{ord(sign):04X}>")
        else:
            shown.append(sign)
    line = " ".join("".join(shown).split())
    cut = len(line) > limit or len(text) > 4 * limit
    return (line[: limit - 1] + "…" if cut else line) or "(empty)"
