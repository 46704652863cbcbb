"""The `efface` command; `python -m efface` is the same. Ctrl-C is heard before anything else is imported."""

from ._interrupt import at_once


def main() -> None:
    at_once()
    from .cli import app

    app(prog_name="efface")


if __name__ == "__main__":
    main()
