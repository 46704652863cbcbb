"""`python -m website check SITE` checks a built site; `python -m website notebooks` runs the notebooks again."""

from __future__ import annotations

import sys
from pathlib import Path

from . import check, notebooks


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["check"] and len(arguments) == 2:
        found = list(check.faults(Path(arguments[1])))
        print(*found, f"{len(found)} faults", sep="\n")
        return int(bool(found))
    if arguments == ["notebooks", "--check"]:
        found = [line for path in notebooks.files() for line in notebooks.differences(path)]
        print(*found, f"{len(found)} differences in {len(notebooks.files())} notebooks", sep="\n")
        return int(bool(found))
    if arguments == ["notebooks"]:
        for path in notebooks.files():
            notebooks.write(path)
            print(path)
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
