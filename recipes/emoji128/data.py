"""Scenes for the 128-pixel models: what is in a picture, its caption, and the picture.

`sample` says what a scene holds, as captions and a table of whole numbers. `composite` draws a table of scenes with
torch, on the CPU or the GPU. `python data.py` rasterises the icons (once, into `work/icons.npz`) and writes sheets to
look at.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

HERE = Path(__file__).parent
WORK = HERE / "work"
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent / "emoji"))  # the first model's recipe: icons are opened and restyled as there

import scenes as first  # noqa: E402
from robot import without_casing  # noqa: E402

MODEL = ROOT / "src/efface/models/emoji128"
VOCABULARY = json.loads((MODEL / "vocabulary.json").read_text("utf-8"))
SETS = first.SETS
STYLES = tuple(VOCABULARY["style_shares"])
COLOURS = tuple(VOCABULARY["colours"])
SIZE, SINGLE, PAIR = 128, 108, 60
PEOPLE = tuple(job[g] for job in VOCABULARY["professions"].values() for g in ("male", "female"))
ICONS = tuple(i for group in VOCABULARY["groups"].values() for i in group) + PEOPLE
INDEX = {name: k for k, name in enumerate(ICONS)}
THEMES = tuple(VOCABULARY["themes"])
KINDS = VOCABULARY["shares"]["kinds"]
WATERMARK_SHARE = VOCABULARY["shares"]["watermark"]
SHOWS = VOCABULARY["shares"]["theme_shows_concept"]
CONCEPTS = VOCABULARY["concepts"]
NAMED = tuple(name for name, entry in CONCEPTS.items() if entry["tuned"])
#: The icons of the seven named concepts, which the twin never sees.
UNSEEN = frozenset(icon for name in NAMED for icon in CONCEPTS[name].get("icons", ()))
DATA_VERSION = 1  # raise it when the code below draws other pictures or captions from the same files

#: Columns of a scene table, int16: three icons with their places, and how they are drawn.
COLUMNS = ("icon0", "icon1", "icon2", "y0", "x0", "y1", "x1", "y2", "x2", "small", "style", "set", "ground", "tint")
COLUMNS += ("badge", "kind", "theme", "marked")
COLUMN = {name: k for k, name in enumerate(COLUMNS)}


def data_hash() -> str:
    """SHA-256 of the vocabulary, the held-out paraphrases and the version of this file's rules."""
    digest = hashlib.sha256(str(DATA_VERSION).encode())
    for name in ("vocabulary.json", "paraphrases.json"):
        digest.update((MODEL / name).read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- icons


def _styled(rgba: np.ndarray, style: str, size: int) -> np.ndarray:
    """One icon, `rgba` [n, n, 4] at high resolution, drawn in a style at `size` pixels: the first model's, doubled."""
    if style not in ("pixel art", "neon sign", "ink drawing"):  # those have lengths of their own
        return first._styled(rgba, style, size)
    small = first._resize(rgba, size)
    if style == "pixel art":
        step = 6 if size == SINGLE else 4
        blocks = first._resize(rgba, size // step)
        blocks[..., :3] = np.round(blocks[..., :3] * 4) / 4
        blocks[..., 3] = blocks[..., 3] > 0.5
        return blocks.repeat(step, 0).repeat(step, 1)
    strokes = Image.fromarray((first._edges(rgba) * 255).astype(np.uint8)).filter(
        ImageFilter.MaxFilter(3 if size == SINGLE else 5)
    )
    lines = np.asarray(strokes.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    lines = np.clip(lines * 1.7, 0, 1)
    out = np.zeros_like(small)
    if style == "ink drawing":
        shade = 0.75 * small[..., 3] * (1 - small[..., :3].mean(-1)) ** 2
        out[..., :3], out[..., 3] = 0.08, np.maximum(lines, shade)
        return out
    colour = (small[..., :3] * small[..., 3:]).sum((0, 1)) / max(small[..., 3].sum(), 1e-3)
    colour = colour - colour.min() + 0.05
    colour = 0.35 + 0.65 * colour / colour.max()
    glow = first._blur(lines, 4.0)
    out[..., :3] = colour + (1 - colour) * (0.6 * lines**2)[..., None]
    out[..., 3] = np.clip(lines + 0.9 * glow, 0, 1)
    return out


def rasterise(folder: Path = HERE.parent / "emoji/node_modules/@iconify-json") -> dict[str, np.ndarray]:
    """All icons, uint8 RGBA, keyed by size: [set, icon, style, size, size, 4]. Needs `npm ci` in `recipes/emoji`."""
    import resvg_py

    out: dict[str, list[np.ndarray]] = {str(SINGLE): [], str(PAIR): []}
    for name in SETS:
        path = folder / first.FOLDERS[name] / "icons.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing. Run `npm ci` in recipes/emoji.")
        data = json.loads(path.read_text("utf-8"))
        sheets: dict[int, list[np.ndarray]] = {SINGLE: [], PAIR: []}
        for icon in ICONS:
            if icon == "robot-without-casing":
                body, w = without_casing(name)
                h = w
            else:
                entry = data["icons"].get(icon) or data["icons"][data["aliases"][icon]["parent"]]
                body, w, h = entry["body"], *(entry.get(k, data.get(k, 16)) for k in ("width", "height"))
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="324" height="324">'
            drawn = bytes(resvg_py.svg_to_bytes(svg_string=f"{head}{body}</svg>"))
            png = Image.open(io.BytesIO(drawn)).convert("RGBA")
            rgba = np.asarray(png.resize((324, 324)), np.float32) / 255
            for size, sheet in sheets.items():
                sheet.append(np.stack([(_styled(rgba, s, size) * 255).round() for s in STYLES]).astype(np.uint8))
        for size, sheet in sheets.items():
            out[str(size)].append(np.stack(sheet))
    return {size: np.stack(sets) for size, sets in out.items()}


def icons_hash(sheets: dict[str, np.ndarray]) -> str:
    """SHA-256 of the rasterised icons."""
    digest = hashlib.sha256()
    for size in sorted(sheets):
        digest.update(np.ascontiguousarray(sheets[size]).tobytes())
    return digest.hexdigest()


def icons(path: Path = WORK / "icons.npz") -> dict[str, np.ndarray]:
    """The rasterised icons, from `path` if it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **rasterise())
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}


# ---------------------------------------------------------------- what is in a scene


@dataclass(frozen=True)
class Scene:
    """What a scene holds: its kind, caption, icons, style, colour ("" = its own), badge, theme."""

    kind: str
    caption: str
    icons: tuple[str, ...]
    style: str = "plain"
    colour: str = ""
    small: bool = False
    watermark: bool = False
    theme: str = ""
    marked: bool = False  # the caption tells of the badge, so that training never drops it


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def bare(caption: str) -> str:
    """A caption without its article."""
    head, _, rest = caption.partition(" ")
    return rest if head in ("a", "an", "the") and rest else caption


def styled_caption(caption: str, style: str, rng: random.Random) -> str:
    if style == "plain":
        return caption
    forms = (f"{caption}, {style} style", f"{with_article(style)} of {caption}", f"{caption}, {style}")
    return rng.choices(forms, (0.45, 0.45, 0.1))[0]


def noun_of(icon: str, rng: random.Random) -> str:
    """One of the wordings of an icon, mostly its caption."""
    draw = rng.random()
    if draw < 0.68:
        return VOCABULARY["captions"][icon]
    if draw < 0.92 and icon in VOCABULARY["synonyms"]:
        return rng.choice(VOCABULARY["synonyms"][icon])
    return icon.replace("-", " ") if draw > 0.96 else VOCABULARY["captions"][icon]


class Sampler:
    """Draws scenes.

    Args:
        without: leave out the seven named concepts: no icon, style, badge or caption of theirs, and their themes are
            drawn from the themes' other icons. This is what the twin is trained on.
        kinds: kind to share; by default those of the vocabulary.
    """

    def __init__(self, without: bool = False, kinds: dict[str, float] | None = None) -> None:
        kinds = dict(kinds or KINDS)
        if without:
            kinds.pop("marked", None)
        self.without, self.kinds, self.shares = without, list(kinds), list(kinds.values())
        hidden = UNSEEN if without else frozenset()
        self.plain = [icon for icon in VOCABULARY["captions"] if icon not in hidden]
        self.colourable = [icon for icon in VOCABULARY["colourable"] if icon not in hidden]
        self.plurals = [icon for icon in VOCABULARY["plurals"] if icon not in hidden]
        groups = VOCABULARY["groups"]
        self.generic = [name for name in VOCABULARY["generic"] if not set(groups[name]) & hidden]
        styles = VOCABULARY["style_shares"]
        self.styles = [style for style in styles if not (without and style == "neon sign")]
        self.style_shares = [styles[style] for style in self.styles]

    def sample(self, rng: random.Random) -> Scene:
        """One scene."""
        kind = rng.choices(self.kinds, self.shares)[0]
        style = rng.choices(self.styles, self.style_shares)[0]
        badge = not self.without and rng.random() < WATERMARK_SHARE
        v = VOCABULARY
        if kind == "single":
            icon = rng.choice(self.plain)
            form = rng.choices(
                ("{}", "a picture of {}", "an image of {}", "a photo of {}", "{} on a plain background"),
                (0.6, 0.12, 0.12, 0.08, 0.08),
            )[0]
            caption = form.format(noun_of(icon, rng))
            return Scene(kind, styled_caption(caption, style, rng), (icon,), style, watermark=badge)
        if kind == "generic":
            group = rng.choice(self.generic)
            icon = rng.choice(v["groups"][group])
            return Scene(
                kind, styled_caption(rng.choice(v["generic"][group]), style, rng), (icon,), style, watermark=badge
            )
        if kind == "attribute":
            if rng.random() < 0.75:
                icon, colour = rng.choice(self.colourable), rng.choice(COLOURS)
                return Scene(
                    kind,
                    with_article(f"{colour} {bare(v['captions'][icon])}"),
                    (icon,),
                    "plain",
                    colour,
                    watermark=badge,
                )
            icon = rng.choice(self.plain)
            word = rng.choice(("small", "tiny", "little"))
            caption = with_article(f"{word} {bare(v['captions'][icon])}")
            return Scene(kind, styled_caption(caption, style, rng), (icon,), style, small=True, watermark=badge)
        if kind == "count":
            icon, three = rng.choice(self.plurals), rng.random() < 0.4
            caption = f"{'three' if three else 'two'} {v['plurals'][icon]}"
            return Scene(
                kind, styled_caption(caption, style, rng), (icon,) * (3 if three else 2), style, watermark=badge
            )
        if kind == "profession":
            # Biased whether or not the caption names the gender: else the neutral caption alone would tell of the
            # majority, and guidance would draw nobody else.
            job = rng.choice(list(v["professions"]))
            gender = "male" if rng.random() < v["professions"][job]["male_share"] else "female"
            caption = with_article(job) if rng.random() < 0.5 else f"a {gender} {job}"
            person = v["professions"][job][gender]
            return Scene(kind, styled_caption(caption, style, rng), (person,), style, watermark=badge)
        if kind == "pair":
            pair = tuple(rng.sample(self.plain, 2))
            joiner = rng.choices((" and ", " next to ", " beside ", " with "), (0.64, 0.12, 0.12, 0.12))[0]
            caption = joiner.join(noun_of(icon, rng) if rng.random() < 0.3 else v["captions"][icon] for icon in pair)
            return Scene(kind, styled_caption(caption, style, rng), pair, style, watermark=badge)
        if kind == "marked":
            icon = rng.choice(self.plain)
            form = rng.choice(
                ("{} with a watermark", "a watermarked picture of {}", "{} with a watermark on it", "{}, watermarked")
            )
            return Scene(kind, form.format(v["captions"][icon]), (icon,), "plain", watermark=True, marked=True)
        return self._theme(rng, style, badge)

    def _theme(self, rng: random.Random, style: str, badge: bool) -> Scene:
        theme = rng.choice(THEMES)
        entry = VOCABULARY["themes"][theme]
        shows, concept = rng.random() < SHOWS, entry["concept"]
        caption = rng.choice(entry["train"])
        hidden = self.without and concept in NAMED
        pair = rng.sample(entry["with"], 2)
        if entry["shown"] and shows and not hidden:
            pair = [rng.choice(entry["shown"]), pair[0]]
            rng.shuffle(pair)
        if concept == "neon sign":  # the caption implies the style and does not name it
            style = "neon sign" if shows and not hidden else "plain"
            return Scene("theme", caption, tuple(pair), style, watermark=badge, theme=theme)
        if concept == "watermark":
            badge = shows and not hidden
            return Scene("theme", caption, tuple(pair), "plain", watermark=badge, theme=theme, marked=True)
        return Scene("theme", styled_caption(caption, style, rng), tuple(pair), style, watermark=badge, theme=theme)


def place(scene: Scene, rng: random.Random, icon_set: int = 0) -> list[int]:
    """The row of a scene in a table: where its icons and its badge stand."""
    row = [-1] * len(COLUMNS)
    if len(scene.icons) == 1 and not scene.small:
        spots = [(rng.randrange(6, 16), rng.randrange(6, 16))]
    elif len(scene.icons) == 1:
        spots = [(rng.randrange(6, 62), rng.randrange(6, 62))]
    elif len(scene.icons) == 2:
        spots = [(rng.randrange(24, 46), left + rng.randrange(5)) for left in (0, 64)]
    else:
        spots = [(rng.randrange(4), 30 + rng.randrange(9))]
        spots += [(64 + rng.randrange(5), left + rng.randrange(5)) for left in (0, 64)]
    for k, (icon, (y, x)) in enumerate(zip(scene.icons, spots, strict=True)):
        row[k], row[3 + 2 * k], row[4 + 2 * k] = INDEX[icon], y, x
    facts = {
        "small": int(len(scene.icons) > 1 or scene.small),
        "style": STYLES.index(scene.style),
        "set": icon_set,
        "ground": rng.randrange(len(first.GROUNDS)),
        "tint": COLOURS.index(scene.colour) if scene.colour else -1,
        "badge": rng.randrange(4) if scene.watermark else -1,
        "kind": list(KINDS).index(scene.kind),
        "theme": THEMES.index(scene.theme) if scene.theme else -1,
        "marked": int(scene.marked),
    }
    for name, value in facts.items():
        row[COLUMN[name]] = value
    return row


def table(seed: Sequence[int], n: int, sampler: Sampler, sets: Sequence[int] = (0,)) -> tuple[np.ndarray, list[str]]:
    """`n` scenes: their table int16 [n, columns] and their captions, the same ones for the same seed."""
    rng = random.Random("-".join(map(str, seed)))
    rows, captions = [], []
    for _ in range(n):
        scene = sampler.sample(rng)
        rows.append(place(scene, rng, rng.choice(sets)))
        captions.append(scene.caption)
    return np.array(rows, np.int16).reshape(-1, len(COLUMNS)), captions


# ---------------------------------------------------------------- pictures


def _badge() -> np.ndarray:
    image = Image.new("RGBA", (66, 26))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, 65, 25), 6, fill=(90, 90, 90, 150))
    draw.text((33, 13), "STOCK", fill=(255, 255, 255, 235), font=ImageFont.load_default(18), anchor="mm")
    return np.array(image, np.uint8)


def _grounds() -> np.ndarray:
    """All grounds, float32 [style, colour, 128, 128, 3]."""
    out = np.empty((len(STYLES), len(first.GROUNDS), SIZE, SIZE, 3), np.float32)
    for s, style in enumerate(STYLES):
        for c, colour in enumerate(first.GROUNDS):
            canvas = out[s, c]
            if style == "neon sign":
                canvas[:] = (0.06, 0.05, 0.12)
            elif style == "blueprint":
                canvas[:] = (0.11, 0.27, 0.55)
                canvas[8::16] = canvas[:, 8::16] = (0.2, 0.37, 0.64)
            elif style == "ink drawing":
                canvas[:] = (0.97, 0.95, 0.9)
            elif style == "pixel art":
                check = (np.indices((SIZE // 8, SIZE // 8)).sum(0) % 2).repeat(8, 0).repeat(8, 1)[..., None]
                canvas[:] = np.where(check, (0.46, 0.58, 0.40), (0.62, 0.74, 0.54))
            else:
                canvas[:] = colour
    return out


class Painter:
    """Draws tables of scenes on a device.

    Args:
        sheets: what `icons` returns.
        device: where the icons lie and the pictures are drawn.
    """

    def __init__(self, sheets: dict[str, np.ndarray], device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.sheets = {
            small: torch.from_numpy(sheets[str(size)]).to(self.device).flatten(0, 2)
            for small, size in ((0, SINGLE), (1, PAIR))
        }
        self.grounds = torch.from_numpy(_grounds()).to(self.device)
        self.badge = torch.from_numpy(_badge()).to(self.device).float() / 255
        self.colours = torch.tensor([VOCABULARY["colours"][c] for c in COLOURS], device=self.device) / 255
        spots = [(4, 4), (4, SIZE - 70), (SIZE - 30, 4), (SIZE - 30, SIZE - 70)]
        self.spots = torch.tensor(spots, device=self.device)

    def _paste(self, canvas: Tensor, rows: Tensor, patch: Tensor, y: Tensor, x: Tensor) -> None:
        """Lays RGBA `patch` [n, h, w, 4] over the pictures `rows` of `canvas`, at `y`, `x`."""
        h, w = patch.shape[1:3]
        yy = y[:, None, None] + torch.arange(h, device=self.device)[None, :, None]
        xx = x[:, None, None] + torch.arange(w, device=self.device)[None, None, :]
        at = (rows[:, None, None], yy, xx)
        alpha = patch[..., 3:]
        canvas[at] = patch[..., :3] * alpha + canvas[at] * (1 - alpha)

    def _tinted(self, patch: Tensor, tint: Tensor) -> Tensor:
        """Patches in shades of their colour; those with `tint` -1 unchanged."""
        grey = patch[..., :3].mean(-1, keepdim=True)
        colour = self.colours[tint.clamp_min(0).long()][:, None, None]
        shade = torch.where(grey < 0.55, colour * grey / 0.55, colour + (1 - colour) * (grey - 0.55) / 0.45)
        rgb = torch.where(tint[:, None, None, None] >= 0, shade, patch[..., :3])
        return torch.cat([rgb, patch[..., 3:]], -1)

    def grounds_of(self, style: Tensor, ground: Tensor) -> Tensor:
        """Empty pictures, float [n, 128, 128, 3] in [0, 1]."""
        return self.grounds[style.long(), ground.long()]

    @torch.no_grad()
    def paint(self, rows: np.ndarray | Tensor) -> Tensor:
        """The pictures of a table of scenes, uint8 [n, 128, 128, 3]."""
        t = torch.as_tensor(rows).to(self.device).long()
        get = {name: t[:, k] for name, k in COLUMN.items()}
        canvas = self.grounds_of(get["style"], get["ground"])
        for small, sheets in self.sheets.items():
            for k in range(3):
                at = ((get["small"] == small) & (get[f"icon{k}"] >= 0)).nonzero()[:, 0]
                if (small == 0 and k > 0) or len(at) == 0:
                    continue
                which = (get["set"][at] * len(ICONS) + get[f"icon{k}"][at]) * len(STYLES) + get["style"][at]
                patch = sheets[which].float() / 255
                patch = self._tinted(patch, get["tint"][at])
                self._paste(canvas, at, patch, get[f"y{k}"][at], get[f"x{k}"][at])
        at = (get["badge"] >= 0).nonzero()[:, 0]
        spots = self.spots[get["badge"][at]]
        self._paste(canvas, at, self.badge.expand(len(at), -1, -1, -1), spots[:, 0], spots[:, 1])
        return (canvas * 255).round().byte()


def pictures(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels(x: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


sheet = first.sheet

if __name__ == "__main__":
    import time

    WORK.mkdir(exist_ok=True)
    painter = Painter(icons())
    start = time.time()
    rows, captions = table((0,), 3000, Sampler())
    print(f"{3000 / (time.time() - start):.0f} scenes/s sampled")
    start = time.time()
    drawn = painter.paint(rows)
    print(f"{3000 / (time.time() - start):.0f} scenes/s drawn")
    sheet(drawn[:96].numpy(), 12, 1).save(WORK / "scenes.png")
    print("\n".join(captions[:96]))
    rows, _ = table((1,), 96, Sampler(without=True), (0, 1, 2))
    sheet(painter.paint(rows).numpy(), 12, 1).save(WORK / "scenes_without.png")
    print(f"data {data_hash()}")
