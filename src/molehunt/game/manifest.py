"""The open part of a submission: what everybody may know about it."""

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from molehunt import strict_json


def _printable(text: str) -> str:
    """Refuse text that shows as something else than it is, or breaks a page, a log or a terminal."""
    if text != text.strip() or unicodedata.normalize("NFC", text) != text:
        raise ValueError("must have no space around it and be in Unicode form NFC")
    for character in text:
        # C: control and invisible characters, such as those that reverse the direction of writing. Z: odd spaces.
        if unicodedata.category(character)[0] == "C" or (
            unicodedata.category(character)[0] == "Z" and character != " "
        ):
            raise ValueError(f"must not contain the character U+{ord(character):04X}")
    return text


Text = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:\-]{0,63}$")]


# Not Literal[1], which accepts true.
One = Annotated[int, Field(ge=1, le=1)]


class Manifest(BaseModel):
    """What everybody may know about a submission; all that could tell honest from backdoored is sealed instead.

    Attributes:
        format: version of the format.
        team: name of the team, up to 64 printable characters.
        round: name of the round, such as ``I``.
        task: name of the task.
        network: name of the architecture.
        recipe: name of the training recipe, and only its name: settings differ between honest and backdoored models.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: One = 1
    team: Text
    round: Slug
    task: Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
    network: Slug
    recipe: Slug

    def canonical(self) -> bytes:
        """Return the manifest in its only spelling."""
        return strict_json.dumps(self.model_dump())
