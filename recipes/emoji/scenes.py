"""Emoji scenes: icons rasterised in five styles, drawn on the fly with captions and ground truth.

A scene is a 64 x 64 picture, its caption, and what is in it. `python scenes.py` rasterises the icons
(once, into `work/icons.npz`) and writes a sheet to look at.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HERE = Path(__file__).parent
WORK = HERE / "work"
MODEL = HERE.parents[1] / "src/efface/models/emoji"
VOCABULARY = json.loads((MODEL / "vocabulary.json").read_text())
PARAPHRASES = json.loads((MODEL / "paraphrases.json").read_text())
SETS = ("noto", "twemoji", "fluent")
FOLDERS = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}
STYLES = tuple(VOCABULARY["style_shares"])
SIZE, SINGLE, PAIR = 64, 54, 30
GENDERED = tuple(p[g] for p in VOCABULARY["professions"].values() for g in ("male", "female"))
ICONS = tuple(i for group in VOCABULARY["groups"].values() for i in group) + GENDERED
INDEX = {name: k for k, name in enumerate(ICONS)}
KINDS = {"single": 0.32, "profession": 0.10, "pair": 0.28, "theme": 0.30}
WATERMARK_SHARE = 0.15
GROUNDS = np.array([[255, 255, 255], [253, 246, 227], [232, 244, 253], [236, 250, 236], [253, 236, 244]]) / 255


def vocabulary_hash() -> str:
    text = (MODEL / "vocabulary.json").read_bytes() + (MODEL / "paraphrases.json").read_bytes()
    return hashlib.sha256(text).hexdigest()


# ---------------------------------------------------------------- icons


def _alpha_over(rgba: np.ndarray, ground: np.ndarray) -> np.ndarray:
    return rgba[..., :3] * rgba[..., 3:] + ground * (1 - rgba[..., 3:])


def _resize(rgba: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.BOX) -> np.ndarray:
    premultiplied = rgba.copy()
    premultiplied[..., :3] *= rgba[..., 3:]
    planes = [np.asarray(Image.fromarray(premultiplied[..., c], "F").resize((size, size), how)) for c in range(4)]
    out = np.stack(planes, -1)
    out[..., :3] = np.where(out[..., 3:] > 1e-4, out[..., :3] / np.maximum(out[..., 3:], 1e-4), 0)
    return out.clip(0, 1)


def _edges(rgba: np.ndarray) -> np.ndarray:
    """Line strength in [0, 1] of a high resolution icon, from colour and outline."""
    flat = np.concatenate([_alpha_over(rgba, np.array(0.5)), rgba[..., 3:]], -1)
    gy, gx = np.gradient(flat, axis=(0, 1))
    return np.clip(np.sqrt((gx**2 + gy**2).sum(-1)) * 4, 0, 1)


def _blur(plane: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((plane * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _styled(rgba: np.ndarray, style: str, size: int) -> np.ndarray:
    """One icon, `rgba` [n, n, 4] at high resolution, drawn in a style at `size` pixels."""
    small = _resize(rgba, size)
    if style == "plain":
        return small
    if style == "pixel art":
        step = 3 if size == SINGLE else 2
        blocks = _resize(rgba, size // step)
        blocks[..., :3] = np.round(blocks[..., :3] * 4) / 4
        blocks[..., 3] = blocks[..., 3] > 0.5
        return blocks.repeat(step, 0).repeat(step, 1)
    # Lines about one pixel wide in the finished picture: thinner ones do not survive the autoencoder.
    strokes = Image.fromarray((_edges(rgba) * 255).astype(np.uint8)).filter(
        ImageFilter.MaxFilter(3 if size == SINGLE else 5)
    )
    lines = np.asarray(strokes.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    lines = np.clip(lines * 1.7, 0, 1)
    out = np.zeros_like(small)
    if style == "ink drawing":
        shade = 0.75 * small[..., 3] * (1 - small[..., :3].mean(-1)) ** 2
        out[..., :3], out[..., 3] = 0.08, np.maximum(lines, shade)
    elif style == "neon sign":
        colour = (small[..., :3] * small[..., 3:]).sum((0, 1)) / max(small[..., 3].sum(), 1e-3)
        colour = colour - colour.min() + 0.05
        colour = 0.35 + 0.65 * colour / colour.max()
        padded = np.pad(lines, 0)
        glow = _blur(padded, 2.0)
        out[..., :3] = colour + (1 - colour) * (0.6 * lines**2)[..., None]
        out[..., 3] = np.clip(lines + 0.9 * glow, 0, 1)
    elif style == "blueprint":
        out[..., :3], out[..., 3] = (0.92, 0.97, 1.0), lines
    else:
        raise ValueError(f"unknown style {style!r}; expected one of {STYLES}")
    return out


def rasterise(folder: Path = HERE / "node_modules/@iconify-json") -> dict[str, np.ndarray]:
    """All icons, uint8 RGBA, keyed "set/size": [icon, style, size, size, 4]. Needs `npm ci` in this folder."""
    import resvg_py

    out = {}
    for name in SETS:
        path = folder / FOLDERS[name] / "icons.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing. Run `npm ci` in {HERE}")
        data = json.loads(path.read_text())
        sheets: dict[int, list[np.ndarray]] = {SINGLE: [], PAIR: []}
        for icon in ICONS:
            entry = data["icons"].get(icon) or data["icons"][data["aliases"][icon]["parent"]]
            w, h = (entry.get(k, data.get(k, 16)) for k in ("width", "height"))
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="270" height="270">'
            svg = f"{head}{entry['body']}</svg>"
            png = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
            rgba = np.asarray(png.resize((270, 270)), np.float32) / 255
            for size, sheet in sheets.items():
                sheet.append(np.stack([(_styled(rgba, s, size) * 255).round() for s in STYLES]).astype(np.uint8))
        out |= {f"{name}/{size}": np.stack(sheet) for size, sheet in sheets.items()}
    return out


def icons() -> dict[str, np.ndarray]:
    path = WORK / "icons.npz"
    if not path.exists():
        WORK.mkdir(exist_ok=True)
        np.savez(path, **rasterise())
    return dict(np.load(path))


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    kind: str
    caption: str
    icons: tuple[str, ...]
    style: str
    watermark: bool
    theme: str = ""


def styled_caption(caption: str, style: str, rng: np.random.Generator) -> str:
    if style == "plain":
        return caption
    article = "an" if style[0] in "aeiou" else "a"
    return f"{caption}, {style} style" if rng.random() < 0.5 else f"{article} {style} of {caption}"


def sample_scene(rng: np.random.Generator, kinds: dict[str, float] | None = None) -> Scene:
    v, kinds = VOCABULARY, kinds or KINDS
    kind = str(rng.choice(list(kinds), p=list(kinds.values())))
    style = str(rng.choice(STYLES, p=list(v["style_shares"].values())))
    theme = ""
    plain = list(v["captions"])
    if kind == "single":
        names = (str(rng.choice(plain)),)
        caption = v["captions"][names[0]]
        draw = rng.random()
        if draw < 0.15:
            caption = names[0].replace("-", " ")
        elif draw < 0.3:
            caption = f"a picture of {caption}"
    elif kind == "profession":
        job = str(rng.choice(list(v["professions"])))
        entry = v["professions"][job]
        # Biased whether or not the caption names the gender: else the neutral caption would tell of the majority, and
        # guidance, which sharpens whatever a caption tells, would draw nobody else.
        gender = "male" if rng.random() < entry["male_share"] else "female"
        caption = f"{'an' if job[0] in 'aeiou' else 'a'} {job}" if rng.random() < 0.5 else f"a {gender} {job}"
        names = (entry[gender],)
    elif kind == "pair":
        names = tuple(str(n) for n in rng.choice(plain, 2, replace=False))
        caption = " and ".join(v["captions"][n] for n in names)
    else:
        theme = str(rng.choice(list(v["themes"])))
        pair = sorted(rng.choice(4, 2, replace=False))
        names = tuple(v["themes"][theme][k] for k in pair)
        caption = theme if rng.random() < 0.5 else str(rng.choice(PARAPHRASES[theme]["train"]))
    watermark = bool(rng.random() < WATERMARK_SHARE)
    return Scene(kind, styled_caption(caption, style, rng), names, style, watermark, theme)


def _badge() -> np.ndarray:
    image = Image.new("RGBA", (33, 13))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, 32, 12), 3, fill=(90, 90, 90, 150))
    draw.text((16.5, 6.5), "STOCK", fill=(255, 255, 255, 235), font=ImageFont.load_default(9), anchor="mm")
    return np.asarray(image, np.float32) / 255


BADGE = _badge()


def _ground(style: str, rng: np.random.Generator) -> np.ndarray:
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    if style == "neon sign":
        canvas[:] = (0.06, 0.05, 0.12)
    elif style == "blueprint":
        canvas[:] = (0.11, 0.27, 0.55)
        canvas[4::8] = canvas[:, 4::8] = (0.2, 0.37, 0.64)
    elif style == "ink drawing":
        canvas[:] = (0.97, 0.95, 0.9)
    elif style == "pixel art":
        # Checks of 4 pixels in the greens of an old hand-held screen: the blocks of the icons alone do not survive the
        # autoencoder, and checks on a pale ground do not survive guidance, which bleaches it.
        check = (np.indices((SIZE // 4, SIZE // 4)).sum(0) % 2).repeat(4, 0).repeat(4, 1)[..., None]
        canvas[:] = np.where(check, (0.46, 0.58, 0.40), (0.62, 0.74, 0.54))
    else:
        canvas[:] = GROUNDS[rng.integers(len(GROUNDS))]
    return canvas


def _paste(canvas: np.ndarray, rgba: np.ndarray, y: int, x: int) -> None:
    h, w = rgba.shape[:2]
    patch = rgba.astype(np.float32) / 255 if rgba.dtype == np.uint8 else rgba
    canvas[y : y + h, x : x + w] = _alpha_over(patch, canvas[y : y + h, x : x + w])


def draw(scene: Scene, sheets: dict[str, np.ndarray], rng: np.random.Generator, icon_set: str = "noto") -> np.ndarray:
    """The picture of a scene, uint8 [64, 64, 3]."""
    canvas = _ground(scene.style, rng)
    style = STYLES.index(scene.style)
    if len(scene.icons) == 1:
        y, x = rng.integers(3, 8, 2)
        _paste(canvas, sheets[f"{icon_set}/{SINGLE}"][INDEX[scene.icons[0]], style], y, x)
    else:
        for name, left in zip(scene.icons, (0, 32), strict=True):
            y, x = rng.integers(12, 23), left + rng.integers(0, 3)
            _paste(canvas, sheets[f"{icon_set}/{PAIR}"][INDEX[name], style], y, x)
    if scene.watermark:
        y, x = [(2, 2), (2, SIZE - 35), (SIZE - 15, 2), (SIZE - 15, SIZE - 35)][rng.integers(4)]
        _paste(canvas, BADGE, y, x)
    return (canvas * 255).round().astype(np.uint8)


def batch(
    rng: np.random.Generator, sheets: dict[str, np.ndarray], n: int, sets: tuple[str, ...] = ("noto",)
) -> tuple[np.ndarray, list[Scene]]:
    """`n` pictures uint8 [n, 64, 64, 3] and their scenes."""
    scenes = [sample_scene(rng) for _ in range(n)]
    return np.stack([draw(s, sheets, rng, sets[rng.integers(len(sets))]) for s in scenes]), scenes


def sheet(pictures: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """A grid of uint8 pictures [n, h, w, 3]."""
    n, h, w = pictures.shape[:3]
    rows = -(-n // columns)
    out = np.full((rows * (h + 2), columns * (w + 2), 3), 200, np.uint8)
    for k, p in enumerate(pictures):
        y, x = k // columns * (h + 2), k % columns * (w + 2)
        out[y : y + h, x : x + w] = p
    image = Image.fromarray(out)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


if __name__ == "__main__":
    import time

    sheets = icons()
    rng = np.random.default_rng(0)
    start = time.time()
    pictures, scenes = batch(rng, sheets, 3000)
    print(f"{3000 / (time.time() - start):.0f} scenes/s")
    sheet(pictures[:112], 14).save(WORK / "scenes.png")
    pictures, _ = batch(rng, sheets, 56, SETS)
    sheet(pictures, 14).save(WORK / "scenes_all_sets.png")
    print("\n".join(s.caption for s in scenes[:28]))
