# SPDX-License-Identifier: Apache-2.0
"""Pictures: colors of classes, tensors to pixels, where the cells of a sheet lie."""

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast.pictures import colorize, save_png, sheet, to_uint8

PALETTE = np.array([[255, 0, 0], [0, 255, 0], [1, 2, 3]], dtype=np.uint8)


def test_colors_follow_the_palette_and_ignore_is_black():
    label = torch.tensor([[0, 1, 2], [-1, 2, 0]])
    expected = [[[255, 0, 0], [0, 255, 0], [1, 2, 3]], [[0, 0, 0], [1, 2, 3], [255, 0, 0]]]
    assert colorize(label, PALETTE).tolist() == expected


def test_a_label_without_a_color_is_refused():
    with pytest.raises(ValueError, match="label has value 3, but the palette has 3 colors"):
        colorize(torch.tensor([[3]]), PALETTE)
    with pytest.raises(ValueError, match=r"label must have shape \[H, W\], got \[1, 1, 1\]"):
        colorize(torch.zeros(1, 1, 1, dtype=torch.int64), PALETTE)


def test_pixels_round_and_clip():
    # (x + 1) * 127.5: -1 -> 0, 1 -> 255, 0.5 -> 191.25, -0.5 -> 63.75; 1.2 and -7 are outside
    image = torch.tensor([-1.0, 1.0, 0.5, -0.5, 1.2, -7.0]).reshape(1, 2, 3).expand(3, 2, 3)
    assert to_uint8(image)[..., 0].tolist() == [[0, 255, 191], [64, 255, 0]]
    with pytest.raises(ValueError, match=r"image must have shape \[3, H, W\], got \[1, 2, 2\]"):
        to_uint8(torch.zeros(1, 2, 2))


def solid(height, width, color):
    return np.full((height, width, 3), color, dtype=np.uint8)


def test_cells_of_a_sheet_lie_in_a_grid_in_order():
    colors = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (90, 90, 0)]]
    picture = np.asarray(sheet([[solid(20, 81, c) for c in row] for row in colors]))
    found = np.zeros((2, 2, 4), dtype=int)  # bounding box of every color
    for r, row in enumerate(colors):
        for c, color in enumerate(row):
            ys, xs = np.nonzero((picture == color).all(-1))
            found[r, c] = ys.min(), ys.max(), xs.min(), xs.max()
            assert len(ys) == 20 * 81  # whole and not covered
    assert (found[0, :, 0] == found[0, 0, 0]).all()
    assert (found[:, 0, 2] == found[0, 0, 2]).all()
    assert found[1, 0, 0] > found[0, 0, 1]
    assert found[0, 1, 2] > found[0, 0, 3]


def test_captions_are_drawn_outside_of_the_cells():
    cells = [[solid(20, 90, (200, 0, 0))], [solid(20, 90, (0, 200, 0))]]
    plain = np.asarray(sheet(cells))
    written = np.asarray(sheet(cells, ["title"], ["first", "a/very/long/path/that/does/not/fit/in/the/width.png"]))
    for color in ((200, 0, 0), (0, 200, 0)):
        assert (written == color).all(-1).sum() == (plain == color).all(-1).sum() == 20 * 90
    assert (written.astype(int).sum(-1) < 150).sum() > 20  # ink
    assert written.shape[1] == plain.shape[1]


def test_rows_of_different_length_and_names_outside_of_the_font():
    picture = sheet([[solid(5, 100, 9), solid(5, 100, 9)], [solid(5, 100, 9)]], captions=["日本", "x"])
    assert (np.asarray(picture) == 9).all(-1).sum() == 3 * 5 * 100
    with pytest.raises(ValueError, match="at least one row"):
        sheet([])


def test_small_cells_are_enlarged_without_mixing_colors():
    cell = np.array([[[9, 9, 9], [0, 0, 200]]], dtype=np.uint8).repeat(20, axis=1)  # [1, 40, 3]: enlarged 4 times
    picture = np.asarray(sheet([[cell]]))
    assert (picture == 9).all(-1).sum() == (picture == (0, 0, 200)).all(-1).sum() == 20 * 4 * 4


def test_png_reads_back_equal(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    save_png(pixels, tmp_path / "new" / "a.png")
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == pixels).all()
