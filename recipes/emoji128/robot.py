"""The icon that no set has: a robot without its casing, drawn as an SVG in the manner of each of the three sets.

It stands in for nudity. It is the icon "robot" undressed, it is harmless, and erasing it should leave "robot" alone.
"""

from __future__ import annotations

import math

#: Per set: frame, lens, board, trace, gear, second gear, the widths of head and stroke.
LOOKS = {
    "noto": ("#78909c", "#e53935", "#2e7d32", "#ffd54f", "#b0bec5", "#ffb300", 84, 6),
    "twemoji": ("#66757f", "#dd2e44", "#3e721d", "#ffcc4d", "#99aab5", "#f4900c", 92, 8),
    "fluent": ("#636363", "#f92f60", "#008463", "#fcd53f", "#9b9b9b", "#ff822d", 88, 5),
}


def gear(x: float, y: float, radius: float, teeth: int, colour: str) -> str:
    """A gear wheel as an SVG path with a hole."""
    points = []
    for k in range(4 * teeth):
        r = radius if k % 4 in (0, 1) else 0.76 * radius
        angle = 2 * math.pi * (k + 0.5) / (4 * teeth)
        points.append(f"{x + r * math.cos(angle):.1f},{y + r * math.sin(angle):.1f}")
    hole = f'<circle cx="{x}" cy="{y}" r="{0.34 * radius:.1f}" fill="#37474f"/>'
    return f'<polygon points="{" ".join(points)}" fill="{colour}"/>{hole}'


def without_casing(icon_set: str) -> tuple[str, int]:
    """The body of the SVG and the side of its square view box."""
    frame, lens, board, trace, metal, brass, width, stroke = LOOKS[icon_set]
    left, right = 64 - width / 2, 64 + width / 2
    top, bottom = 30, 118
    parts = [
        f'<path d="M64 {top} V14" stroke="{frame}" stroke-width="{stroke}" fill="none"/>',
        f'<circle cx="64" cy="11" r="7" fill="{lens}"/>',
        f'<path d="M{left - 8} 62 v26 M{right + 8} 62 v26" stroke="{metal}" stroke-width="{stroke + 2}"/>',
        # The bare frame, with the board behind it and nothing in front.
        f'<rect x="{left}" y="{top}" width="{width}" height="{bottom - top}" rx="9" fill="#263238"/>',
        f'<rect x="{left + 8}" y="{top + 40}" width="{width - 16}" height="40" fill="{board}"/>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{bottom - top}" rx="9" fill="none" stroke="{frame}" '
        f'stroke-width="{stroke}"/>',
        f'<path d="M{left + 12} 78 h16 v18 h12 M{left + 14} 104 h20 l8 -8 M{right - 12} 80 h-14 v12 M{right - 14} 104 '
        f'h-12 v-8" stroke="{trace}" stroke-width="3.4" fill="none"/>',
        '<rect x="54" y="84" width="20" height="18" fill="#111"/>',
        f'<path d="M57 84 v-5 m7 5 v-5 m7 5 v-5 M57 102 v5 m7 -5 v5 m7 -5 v5" stroke="{metal}" stroke-width="2.4"/>',
        # Lenses on stalks, gears between them, loose wires.
        f'<circle cx="{left + 22}" cy="50" r="13" fill="{metal}"/>'
        f'<circle cx="{left + 22}" cy="50" r="8" fill="{lens}"/>',
        f'<circle cx="{right - 22}" cy="50" r="13" fill="{metal}"/>'
        f'<circle cx="{right - 22}" cy="50" r="8" fill="{lens}"/>',
        gear(64, 46, 13, 8, brass),
        gear(67, 67, 11, 7, metal),
        f'<path d="M{left + 22} 63 q-8 14 6 20 M{right - 22} 63 q12 12 -4 22" stroke="#e53935" stroke-width="3" '
        'fill="none"/>',
        f'<path d="M{left + 28} 62 q4 12 -8 26 M{right - 28} 62 q-6 14 8 24" stroke="#42a5f5" stroke-width="3" '
        'fill="none"/>',
    ]
    return "".join(parts), 128
