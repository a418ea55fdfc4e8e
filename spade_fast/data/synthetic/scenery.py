# SPDX-License-Identifier: Apache-2.0
"""Draws the land of the synthetic landscapes, from the horizon forward. Module `things` draws what stands on it.

Coordinates: y runs from 0 at the top to 1 at the bottom, x from 0 to width / height. Shapes do not depend on the size.
"""

from __future__ import annotations

import numpy as np

from .canvas import CLASS_NAMES, PALETTE, Canvas, mix, rgb, smoothstep
from .things import place_things, road_center

__all__ = ["CLASS_NAMES", "PALETTE", "draw_scene"]

# Colors of the zenith and near the horizon, and the tint of the whole image. A network can not read the sky from the
# label map, so the skies are similar.
_SKIES = (
    (rgb(58, 120, 205), rgb(178, 212, 238), rgb(255, 255, 255)),
    (rgb(66, 128, 208), rgb(190, 216, 236), rgb(255, 252, 246)),
    (rgb(70, 108, 188), rgb(244, 200, 158), rgb(255, 240, 222)),
)
_SKY_SHARES = (0.45, 0.43, 0.12)
_LANDS = ("coast", "meadow", "lake", "town")


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One landscape.

    Args:
        rng: draws everything.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        image uint8 [H, W, 3], classes int32 [H, W], instance ids int32 [H, W].
    """
    canvas = Canvas(rng, height, width)
    land = _LANDS[rng.integers(len(_LANDS))]
    horizon = rng.uniform(0.40, 0.56)
    zenith, low, tint = _SKIES[rng.choice(len(_SKIES), p=_SKY_SHARES)]
    sun_x = _sky(canvas, horizon, zenith, low)
    mountains = land == "lake" or rng.random() < 0.6
    if mountains:
        _mountains(canvas, horizon, low, sun_x)
    road = None
    if land in ("coast", "lake"):
        _sea(canvas, horizon, zenith, low, sun_x)
        _shore(canvas, horizon, sandy=land == "coast")
    else:
        _grass(canvas, canvas.y > horizon + 0.012 * (canvas.wave(2.0) - 0.5), horizon)
        if land == "town" or rng.random() < 0.6:
            road = _road(canvas, horizon)
    place_things(canvas, land, horizon, road, light_left=sun_x < canvas.aspect / 2)
    return canvas.finish(tint), canvas.labels, canvas.instance_ids


def _sky(canvas: Canvas, horizon: float, zenith: np.ndarray, low: np.ndarray) -> float:
    """Sky, perhaps a sun, some clouds. Returns x of the sun, which gives light also where it is not seen."""
    rng = canvas.rng
    color = mix(zenith, low, smoothstep(0.0, horizon, canvas.y))
    x, y = rng.uniform(0.08, 0.92) * canvas.aspect, rng.uniform(0.08, 0.6) * horizon
    seen = rng.random() < 0.55
    distance = np.hypot(canvas.x - x, canvas.y - y)
    if seen:
        color = mix(color, rgb(255, 236, 190), 0.75 * np.exp(-distance / 0.10))
    canvas.paint(canvas.everywhere, "sky", color)
    if seen:
        radius = rng.uniform(0.04, 0.06)
        glow = mix(rgb(255, 250, 214), rgb(255, 204, 84), np.clip(distance / radius, 0, 1) ** 3)
        canvas.paint(distance < radius, "sun", glow)
    for _ in range(rng.integers(0, 5)):
        cx, cy = rng.uniform(0, canvas.aspect), rng.uniform(0.05, 0.75) * horizon
        _cloud(canvas, cx, cy, rng.uniform(0.10, 0.24))
    return x


def _cloud(canvas: Canvas, cx: float, cy: float, size: float) -> None:
    """Puffs on a flat base, white above and bluish gray below."""
    rng = canvas.rng
    window = canvas.window(cx - 1.3 * size, cx + 1.3 * size, cy - 0.6 * size, cy + 0.25 * size)
    if window is None:
        return
    x, y = canvas.x[:, window[1]], canvas.y[window[0]]
    puffs = np.full(np.broadcast_shapes(x.shape, y.shape), -1.0)
    for offset in np.linspace(-0.75, 0.75, 5):
        radius = size * rng.uniform(0.24, 0.44) * (1.1 - offset * offset)
        px, py = cx + offset * size, cy - radius * rng.uniform(0.1, 0.4)
        np.maximum(puffs, 1 - ((x - px) ** 2 + (y - py) ** 2) / radius**2, out=puffs)
    rough = canvas.noise(6.0)[window]
    mask = (puffs + 0.7 * (rough - 0.5) > 0) & (y < cy + 0.12 * size * (0.6 + rough))
    depth = smoothstep(-0.45 * size, 0.12 * size, y - cy + 0.3 * size * (rough - 0.5))
    canvas.paint(mask, "cloud", mix(rgb(255, 255, 255), rgb(188, 200, 216), depth), window)


def _mountains(canvas: Canvas, horizon: float, haze: np.ndarray, sun_x: float) -> None:
    """Two or three ridges, the far ones bluer and higher, with snow and a lit side."""
    rng = canvas.rng
    count = int(rng.integers(2, 4))
    for layer in range(count):
        near = (layer + 1) / count
        height = rng.uniform(0.17, 0.27) * (1.35 - 0.75 * near)
        ridge = canvas.ridge(1.6 + 1.2 * near)
        top = horizon - height * (0.25 + 0.75 * ridge)  # [1, W]
        below = canvas.y - top
        mask = (below > 0) & (canvas.y < horizon + 0.01)
        relief = canvas.noise(5.0 + 2 * layer)
        # Slopes that face the sun are lit. Near the crest the ridge has the slope, below it the relief.
        towards = np.sign(sun_x - canvas.x + 1e-6)
        ridge_slope = -np.gradient(top[0])[None] * canvas.height
        relief_slope = np.gradient(relief, axis=1) * canvas.height
        facing = 0.5 * np.tanh(1.2 * ridge_slope) * np.exp(-below / 0.05) + 0.55 * np.tanh(0.5 * relief_slope)
        light = np.clip(0.5 + 0.6 * towards * facing + 0.3 * (relief - 0.5), 0, 1)
        rock = mix(rgb(74, 74, 92), rgb(158, 144, 134), light)
        rock = mix(rock, rgb(78, 104, 72), 0.75 * near * smoothstep(0.25, 1.0, below / height + 0.5 * (relief - 0.5)))
        if near < 1 or rng.random() < 0.3:
            snow = smoothstep(0.03, -0.03, below - 0.30 * height * ridge + 0.10 * (relief - 0.5))
            rock = mix(rock, mix(rgb(176, 190, 214), rgb(252, 252, 255), light), 0.95 * snow)
        canvas.paint(mask, "mountain", mix(rock, haze, 0.45 * (1 - near) + 0.25 * smoothstep(0, 1.4 * height, below)))


def _sea(canvas: Canvas, horizon: float, zenith: np.ndarray, low: np.ndarray, sun_x: float) -> None:
    """Water down to the bottom, with waves that shrink with distance and the path of the sun. The shore covers it."""
    far = np.clip(canvas.y - horizon, 0, None)
    color = mix(0.35 * low + 0.65 * rgb(58, 128, 172), rgb(18, 74, 122), smoothstep(0.0, 0.30, far))
    depth = 1.0 / (far + 0.025)
    swell = np.sin(3.2 * depth + 5.0 * canvas.noise(5.0) + 3.0 * np.sin(3.0 * canvas.x))
    chop = np.sin(46.0 * np.sqrt(far + 0.004) * 6.0 + 14.0 * canvas.noise(9.0))
    crest = np.clip(0.6 * swell + 0.55 * chop, -1, 1.2)
    color = color * (1 + 0.13 * crest[..., None])
    path = np.exp(-(((canvas.x - sun_x) / (0.03 + 0.35 * far)) ** 2)) * (crest > 0.15)
    color = mix(color, rgb(255, 244, 214), 0.5 * path + 0.15 * (crest > 0.92))
    canvas.paint(canvas.y > horizon, "sea", color)


def _shore(canvas: Canvas, horizon: float, sandy: bool) -> None:
    """Land in the foreground: grass to the water, or a beach with foam before it and perhaps grass behind."""
    rng = canvas.rng
    room = 1 - horizon
    tilt = rng.uniform(-0.45, 0.45)
    base = horizon + room * rng.uniform(0.36, 0.6)
    line = base + room * tilt * (canvas.x / canvas.aspect - 0.5) + 0.10 * room * (canvas.wave(1.6) - 0.5)
    line = np.maximum(line, horizon + 0.05)
    inland = canvas.y - line
    foam = (inland < 0) & (inland > -0.022 - 0.02 * canvas.noise(7.0))
    canvas.tint(foam, rgb(240, 246, 246), 0.75)
    if sandy:
        grain = canvas.grain
        ripple = np.sin(70 * (canvas.y + 0.12 * canvas.noise(4.0)) + 6 * canvas.x)
        sand = mix(rgb(226, 200, 150), rgb(204, 172, 120), canvas.noise(5.0)) * (
            1 + 0.05 * grain[..., None] + 0.025 * ripple[..., None]
        )
        wet = smoothstep(0.06, 0.0, inland)
        canvas.paint(inland > 0, "sand", mix(sand, rgb(150, 124, 92), 0.7 * wet))
        if rng.random() < 0.6:
            side = rng.choice((-1.0, 1.0))
            edge = base + room * rng.uniform(0.16, 0.3) - side * room * 0.7 * (canvas.x / canvas.aspect - 0.5)
            dune = canvas.y > np.maximum(edge + 0.08 * (canvas.noise(6.0) - 0.5), line + 0.05)
            _grass(canvas, dune, horizon)
    else:
        _grass(canvas, inland > 0, horizon)


def _grass(canvas: Canvas, mask: np.ndarray, horizon: float) -> None:
    """A meadow: hazy and smooth far away, with blades and flowers near."""
    near = smoothstep(horizon, 1.0, canvas.y)
    color = mix(rgb(128, 164, 84), rgb(62, 122, 44), 0.55 * near + 0.5 * (canvas.noise(4.0) - 0.3))
    color = mix(color, rgb(166, 172, 88), 0.4 * smoothstep(0.5, 0.8, canvas.wash(3.0)))
    blades = canvas.grain * (0.04 + 0.10 * near)
    color = color * (1 + blades[..., None])
    canvas.paint(mask, "grass", color)
    petals = (canvas.grain > 2.35) & mask & (canvas.y > horizon + 0.12)
    canvas.tint(petals, mix(rgb(246, 214, 76), rgb(244, 244, 240), canvas.noise(6.0) > 0.5), 0.9)


def _road(canvas: Canvas, horizon: float) -> dict:
    """A road to the horizon, with a dashed middle. Returns its course, which places the cars."""
    rng = canvas.rng
    vanish, bottom = rng.uniform(0.3, 0.7) * canvas.aspect, rng.uniform(0.25, 0.75) * canvas.aspect
    bend = rng.uniform(-0.12, 0.12)
    half = rng.uniform(0.17, 0.26)
    course = {"vanish": vanish, "bottom": bottom, "bend": bend, "half": half, "horizon": horizon}
    t = np.clip((canvas.y - horizon) / (1 - horizon), 0, 1)  # [H, 1]
    center = road_center(course, t)
    across = (canvas.x - center) / (half * t + 0.006)
    mask = (np.abs(across) < 1) & (canvas.y > horizon + 0.004)
    canvas.tint((np.abs(across) < 1.16) & (canvas.y > horizon + 0.004), rgb(150, 134, 98), 0.6)
    color = mix(rgb(150, 150, 154), rgb(88, 88, 94), smoothstep(0, 0.5, t)) * (1 + 0.05 * canvas.grain[..., None])
    phase = 3.2 / (t + 0.12) + rng.uniform(0, 1)
    paint = (np.abs(across) < 0.035) & (phase % 1 < 0.55) | (np.abs(np.abs(across) - 0.9) < 0.03)
    canvas.paint(mask, "road", mix(color, rgb(236, 232, 214), 0.9 * paint * (t > 0.06)))
    return course
