"""The model bank: clean and backdoored models whose truth is known, in three partitions that share nothing."""

from molehunt.bank.roster import FAMILIES, PARTITIONS, SIZES, Entry, entries
from molehunt.bank.rows import Row, build, read_rows, regrow

__all__ = ["FAMILIES", "PARTITIONS", "SIZES", "Entry", "Row", "build", "entries", "read_rows", "regrow"]
