"""`python -m molehunt` is the program."""

from molehunt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
