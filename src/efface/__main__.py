"""The `efface` command, also as `python -m efface`. Handles Ctrl-C before anything else is imported."""

from ._interrupt import at_once


def main() -> None:
    at_once()
    from .cli import app

    app(prog_name="efface")


if __name__ == "__main__":
    main()
