"""The kernel that cuts images into views against torch's `interpolate`: on a GPU where there is one, else interpreted."""

import numpy as np
import pytest
import torch


pytest.importorskip("triton")

from joint_controller.molmo.view_cutting import ViewGeometry, cut_by_interpolation
from joint_controller.molmo.view_kernel import cut_by_kernel


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = ViewGeometry(side=4, patch=2, window=3, mean=(0.48, 0.45, 0.41), std=(0.27, 0.26, 0.28))


@pytest.mark.parametrize(
    ("size", "tiling"),
    [
        ((12, 16), (1, 1)),
        ((30, 11), (2, 1)),
        ((24, 35), (1, 2)),
        ((3, 2), (1, 2)),
        ((1, 20), (1, 2)),
        ((8, 8), (1, 1)),
    ],
)
def test_views_are_those_of_interpolation(size, tiling):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*size, 4), dtype=np.uint8)).to(DEVICE)
    expected = cut_by_interpolation(pixels, GEOMETRY, tiling)
    torch.testing.assert_close(cut_by_kernel(pixels, GEOMETRY, tiling), expected, rtol=0, atol=5e-4)


def test_no_pixel_has_the_value_of_padding():
    """Of each channel, one level of a plain image would be normalised to exactly -1."""
    plain = ViewGeometry(side=4, patch=2, window=3, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0))
    pixels = torch.zeros(10, 10, 4, dtype=torch.uint8, device=DEVICE)
    views = cut_by_kernel(pixels, plain, (1, 1))
    assert not (views == -1).any() and (views + 1).abs().max() < 1e-6
