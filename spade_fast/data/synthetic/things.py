# SPDX-License-Identifier: Apache-2.0
"""Trees, buildings, people and cars of the synthetic landscapes, each an instance, drawn from far to near."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .canvas import CLASS_NAMES, Canvas, mix, rgb, smoothstep

_WALLS = (rgb(196, 104, 78), rgb(214, 176, 132), rgb(222, 208, 186), rgb(176, 122, 98), rgb(202, 146, 104))
_SHIRTS = (rgb(206, 52, 60), rgb(232, 110, 60), rgb(190, 48, 110), rgb(220, 74, 74))
_PAINTS = (rgb(176, 28, 40), rgb(196, 60, 36), rgb(150, 24, 60), rgb(188, 40, 88))


def road_center(course: dict, t: float | np.ndarray) -> float | np.ndarray:
    """The x of the middle of the road at t, which runs from 0 on the horizon to 1 at the bottom."""
    straight = course["vanish"] + (course["bottom"] - course["vanish"]) * t
    return straight + course["bend"] * np.sin(np.pi * t)


def place_things(canvas: Canvas, land: str, horizon: float, road: dict | None, light_left: bool) -> None:
    """Puts things on the land. Far things stand higher in the image, are smaller and are drawn first."""
    rng = canvas.rng
    plan: list[tuple[float, Callable, float]] = []  # (y of the foot, painter, x)

    def depth(low: float, high: float) -> float:
        return horizon + (1 - horizon) * rng.uniform(low, high)

    def spread() -> float:
        return rng.uniform(-0.02, 1.02) * canvas.aspect

    def add(count: int, painter: Callable, low: float, high: float) -> None:
        plan.extend((depth(low, high), painter, spread()) for _ in range(count))

    if land == "town":
        x = rng.uniform(-0.1, 0.05)
        foot = horizon + 0.05
        while x < canvas.aspect:  # a row of houses, with gaps
            plan.append((foot + rng.uniform(0, 0.04), _building, x))
            x += rng.uniform(0.16, 0.3)
        add(int(rng.integers(2, 6)), _tree, 0.12, 0.5)
        add(int(rng.integers(1, 5)), _person, 0.2, 0.75)
    elif land == "meadow":
        add(int(rng.integers(0, 3)), _building, 0.08, 0.3)
        add(int(rng.integers(4, 13)), _tree, 0.02, 0.6)
        add(int(rng.integers(0, 4)), _person, 0.25, 0.8)
    else:
        add(int(rng.integers(3, 11)), _tree, 0.45, 0.95)
        add(int(rng.integers(1, 6)), _person, 0.45, 0.9)
        add(int(rng.integers(0, 2)), _building, 0.5, 0.7)
    if road is not None:
        for _ in range(int(rng.integers(1, 4))):
            t = rng.uniform(0.14, 0.75)
            middle = road_center(road, t)
            lane = rng.choice((-0.48, 0.48)) * road["half"] * t
            plan.append((horizon + (1 - horizon) * t, _car, middle + lane))
    for foot, painter, x in sorted(plan, key=lambda thing: thing[0]):
        if _stands(canvas, painter, x, foot):
            painter(canvas, x, foot, (foot - horizon) / (1 - horizon), light_left)


def _stands(canvas: Canvas, painter: Callable, x: float, foot: float) -> bool:
    """Whether the ground at the foot suits the thing: nothing stands in the sea, no tree or house on the road."""
    row = min(canvas.height - 1, int(foot * canvas.height))
    column = min(canvas.width - 1, max(0, int(x * canvas.height)))
    ground = CLASS_NAMES[canvas.labels[row, column]]
    if painter is _car:
        return ground in ("road", "car")
    if painter is _person:
        return ground in ("grass", "sand", "road", "tree", "person")
    return ground in ("grass", "tree", "building") or (painter is _tree and ground == "sand")


def _local(
    canvas: Canvas, x0: float, x1: float, y0: float, y1: float
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray] | None:
    """A window of the canvas, with the x [1, w] and y [h, 1] of its pixels; None if it is outside of the image."""
    window = canvas.window(x0, x1, y0, y1)
    if window is None:
        return None
    return window, canvas.x[:, window[1]], canvas.y[window[0]]


def _shadow(canvas: Canvas, x: float, foot: float, half: float, light_left: bool) -> None:
    """A soft ellipse on the ground, away from the light."""
    cx = x + (0.35 if light_left else -0.35) * half
    local = _local(canvas, cx - 1.6 * half, cx + 1.6 * half, foot - 0.5 * half, foot + 0.5 * half)
    if local is not None:
        window, px, py = local
        r = ((px - cx) / (1.5 * half)) ** 2 + ((py - foot) / (0.38 * half)) ** 2
        canvas.shade(0.42 * smoothstep(1.0, 0.3, r), window)


def _tree(canvas: Canvas, x: float, foot: float, near: float, light_left: bool) -> None:
    """A broad-leaved tree, or a conifer: trunk and crown are one instance."""
    rng = canvas.rng
    tall = (0.09 + 0.40 * near) * rng.uniform(0.8, 1.15)
    half = tall * rng.uniform(0.30, 0.42)
    conifer = rng.random() < 0.4
    _shadow(canvas, x, foot, 0.8 * half, light_left)
    local = _local(canvas, x - 1.2 * half, x + 1.2 * half, foot - 1.1 * tall, foot)
    if local is None:
        return
    window, px, py = local
    number = canvas.instance()
    trunk = (np.abs(px - x) < 0.09 * half + 0.012 * tall) & (py > foot - 0.4 * tall)
    canvas.paint(trunk, "tree", rgb(92, 66, 44), window, number)
    leaves = 0.5 + 0.28 * canvas.grain[window]
    side = (x - px) / half if light_left else (px - x) / half
    up = (foot - py) / tall  # 0 at the foot, 1 at the top
    if conifer:
        tier = (up * 4.5) % 1
        reach = half * 0.95 * np.clip(1.04 - up, 0, 1) * (1.12 - 0.38 * tier)
        crown = (np.abs(px - x) < reach * (0.88 + 0.24 * leaves)) & (up > 0.13)
        light = 0.45 + 0.3 * side + 0.35 * (leaves - 0.5) - 0.35 * (tier > 0.8)
        color = mix(rgb(18, 56, 38), rgb(62, 116, 66), light)
    else:
        crown = np.zeros(np.broadcast_shapes(px.shape, py.shape), dtype=bool)
        light = np.zeros(crown.shape, dtype=np.float32)
        lobes = ((0.0, 0.72, 0.62), (-0.5, 0.55, 0.48), (0.5, 0.55, 0.48), (-0.25, 0.80, 0.45), (0.28, 0.82, 0.42))
        for dx, dy, size in lobes:
            cx, cy, r = x + dx * half, foot - (dy + 0.06 * rng.uniform(-1, 1)) * tall, size * half
            inside = 1 - ((px - cx) ** 2 + (py - cy) ** 2) / r**2
            crown |= inside + 0.35 * (leaves - 0.5) > 0
            lit = ((cx - px) if light_left else (px - cx)) / r * 0.45 + (cy - py) / r * 0.55
            np.maximum(light, np.where(inside > -0.2, 0.42 + 0.5 * lit, 0), out=light)
        light = light + 0.55 * (leaves - 0.5) + 0.15 * (up - 0.6)
        color = mix(rgb(22, 64, 26), rgb(112, 158, 62), light)
    canvas.paint(crown, "tree", color, window, number)


def _building(canvas: Canvas, x: float, foot: float, near: float, light_left: bool) -> None:
    """A house with a gable roof or a block of flats, with rows of windows and a door; x is its left side."""
    rng = canvas.rng
    block = rng.random() < 0.45
    wide = (0.15 + 0.16 * near) * rng.uniform(0.8, 1.2)
    tall = wide * (rng.uniform(1.2, 2.1) if block else rng.uniform(0.55, 0.8))
    roof = 0.0 if block else 0.45 * wide
    local = _local(canvas, x - 0.06 * wide, x + 1.06 * wide, foot - tall - roof, foot)
    if local is None:
        return
    window, px, py = local
    number = canvas.instance()
    u, v = (px - x) / wide, (foot - py) / tall  # 0..1 over the wall, v upwards
    wall = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    color = _WALLS[rng.integers(len(_WALLS))] * (0.96 + 0.05 * canvas.grain[window][..., None])
    # The wall away from the light is in shade.
    dark = (u > 0.72) if light_left else (u < 0.28)
    color = color * (1 - 0.26 * dark[..., None])
    columns = 5 if block else 3
    rows = max(2, round(columns * tall / wide * 0.9)) if block else 2
    cu, cv = (u * columns) % 1, (v * rows) % 1
    pane = (np.abs(cu - 0.5) < 0.24) & (np.abs(cv - 0.55) < 0.27) & wall & (v > 0.6 / rows if not block else v > 0)
    lit = mix(rgb(62, 84, 110), rgb(150, 186, 208), 0.9 * (1 - cv) * (cu + 0.2))
    color = np.where(pane[..., None], lit, color)
    door = (np.abs(u - 0.5) < 0.5 / columns * 0.62) & (v < 0.72 / rows)
    color = np.where(door[..., None], rgb(86, 54, 40), color)
    if block:
        color = np.where((v > 0.95)[..., None], rgb(112, 104, 100), color)
    canvas.paint(wall, "building", color, window, number)
    if roof:
        up = (foot - tall - py) / roof
        gable = (up >= -0.06) & (np.abs(u - 0.5) < 0.56 * (1 - up))
        tiles = 1 - 0.16 * ((up * 7) % 1 < 0.25)
        shade = np.where(dark, 0.8, 1.0) * tiles
        canvas.paint(gable, "building", rgb(138, 52, 42) * shade[..., None], window, number)
    _shadow(canvas, x + 0.5 * wide, foot + 0.006, 0.55 * wide, light_left)


def _person(canvas: Canvas, x: float, foot: float, near: float, light_left: bool) -> None:
    """Head, trunk with arms, and legs."""
    rng = canvas.rng
    tall = 0.055 + 0.22 * near
    _shadow(canvas, x, foot, 0.22 * tall, light_left)
    local = _local(canvas, x - 0.25 * tall, x + 0.25 * tall, foot - tall, foot)
    if local is None:
        return
    window, px, py = local
    number = canvas.instance()
    u, v = (px - x) / tall, (foot - py) / tall
    stride = rng.uniform(0.3, 0.8)
    legs = (v >= 0) & (v < 0.5) & (np.abs(np.abs(u) - 0.12 * stride * (1 - v / 0.55)) < 0.062)
    trunk = (v >= 0.44) & (v < 0.83) & (np.abs(u) < 0.085 + 0.09 * (v - 0.44) / 0.39)
    head = u**2 + (v - 0.905) ** 2 < 0.088**2
    light = 1.0 + (0.3 if light_left else -0.3) * np.clip(-u / 0.15, -1, 1)
    canvas.paint(legs, "person", rgb(44, 48, 84), window, number)
    canvas.paint(trunk, "person", _SHIRTS[rng.integers(len(_SHIRTS))] * (light + 0 * v)[..., None], window, number)
    canvas.paint(head & (v < 0.94), "person", rgb(226, 174, 140) * (light + 0 * v)[..., None], window, number)
    canvas.paint(head & (v >= 0.94), "person", rgb(62, 40, 30), window, number)


def _car(canvas: Canvas, x: float, foot: float, near: float, light_left: bool) -> None:
    """A car from behind or before: body, cabin with a window, lamps, wheels."""
    rng = canvas.rng
    wide = 0.03 + 0.20 * near
    local = _local(canvas, x - 0.6 * wide, x + 0.6 * wide, foot - 0.85 * wide, foot + 0.02)
    if local is None:
        return
    window, px, py = local
    _shadow(canvas, x, foot, 0.55 * wide, light_left)
    number = canvas.instance()
    u, v = (px - x) / wide, (foot - py) / wide
    wheels = (np.abs(np.abs(u) - 0.36) < 0.09) & (v >= 0) & (v < 0.2)
    body = (v >= 0.1) & (v < 0.46) & (np.abs(u) < 0.5 - 0.06 * smoothstep(0.38, 0.46, v))
    cabin = (v >= 0.42) & (v < 0.76) & (np.abs(u) < 0.42 - 0.38 * (v - 0.42))
    color = _PAINTS[rng.integers(len(_PAINTS))]
    gloss = 0.8 + 0.55 * smoothstep(0.1, 0.46, v) - 0.2 * smoothstep(0.46, 0.5, v) + 0 * u
    canvas.paint(wheels, "car", rgb(28, 28, 32), window, number)
    canvas.paint(body | cabin, "car", np.clip(color * gloss[..., None], 0, 1), window, number)
    glass = (v > 0.47) & (v < 0.70) & (np.abs(u) < 0.36 - 0.38 * (v - 0.42))
    canvas.paint(glass, "car", mix(rgb(60, 80, 100), rgb(176, 204, 222), 2.2 * (v - 0.45) + 0 * u), window, number)
    lamps = (np.abs(np.abs(u) - 0.4) < 0.06) & (np.abs(v - 0.34) < 0.05)
    canvas.paint(lamps, "car", rgb(255, 226, 150) if rng.random() < 0.5 else rgb(255, 70, 50), window, number)
    plate = (np.abs(u) < 0.12) & (np.abs(v - 0.2) < 0.04)
    canvas.paint(plate, "car", rgb(238, 238, 230), window, number)
