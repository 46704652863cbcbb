"""What counts as a concept, as a picture: its icons and near ones, from the icons that the model was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from efface.pictures import png

from .code import ROOT
from .worlds import world

ICONS = ROOT / "recipes/emoji128/work/icons.npz"
SIDE, GAP, COLUMNS = 84, 10, 5


def legend(concept: str, icons: Path = ICONS) -> bytes:
    """A PNG with the icons of a concept of `emoji-128`, and with near ones that do not count, in all three designs.

    Args:
        concept: a concept of the vocabulary that has icons.
        icons: what `python data.py` of the model's recipe rasterised.

    Raises:
        FileNotFoundError: there are no icons.
    """
    if not icons.is_file():
        raise FileNotFoundError(
            f"There are no icons at {icons}. Run `npm ci` in recipes/emoji and `python data.py` in recipes/emoji128, "
            "or name the file with --icons."
        )
    of = world("emoji-128")
    with np.load(icons) as stored:
        plain = stored["108"][:, :, 0]  # [set, icon, 108, 108, 4], without a style
    parts = [
        (f"{concept}: answer 1 if a picture shows any of these", of.truth(concept) or ()),
        (f"near, but not {concept}: answer 2 if only these or other things are recognisable", _near(concept)),
    ]
    wide, high = 3 * SIDE + GAP, SIDE + 24 + GAP
    lines = sum(-(-len(names) // COLUMNS) for _, names in parts)
    out = Image.new("RGB", (GAP + wide * COLUMNS, GAP + 34 * len(parts) + high * lines), "white")
    draw, y = ImageDraw.Draw(out), GAP
    for title, names in parts:
        draw.text((GAP, y), title, fill="black", font=ImageFont.load_default(20))
        y += 34
        for k, name in enumerate(names):
            x, top = GAP + wide * (k % COLUMNS), y + high * (k // COLUMNS)
            draw.text((x, top), of.captions.get(name, name), fill="black", font=ImageFont.load_default(15))
            for design in range(len(plain)):
                icon = Image.fromarray(plain[design, of.icons[name]], "RGBA").resize((SIDE - 6, SIDE - 6))
                out.paste(icon, (x + SIDE * design, top + 22), icon)
        y += high * -(-len(names) // COLUMNS)
    return png(out)


def _near(concept: str) -> tuple[str, ...]:
    return tuple(world("emoji-128").data["vocabulary"]["near"].get(concept, ()))
