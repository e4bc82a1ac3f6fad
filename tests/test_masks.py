"""Masks: one reading of everything a user may hand over, OR-pooled to every grid, distances against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import diffgraft as dg
from diffgraft.attention.masks import as_mask, as_masks, fit, level_grid, level_mask
from diffgraft.attention.morphology import distance, drop_small, feather, fill_holes, grow

TRUTH = np.zeros((24, 40), bool)
TRUTH[5:14, 8:30] = True
TRUTH[20, 35] = True


def bytes_of(mask, high=255):
    return (mask * high).astype(np.uint8)


def rgba(mask, colour):
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = bytes_of(mask)
    return Image.fromarray(pixels)


def same(tmp_path):
    """The same mask in every form."""
    grey = Image.fromarray(bytes_of(TRUTH))
    grey.save(tmp_path / "mask.png")
    colour = np.repeat(bytes_of(TRUTH)[..., None], 3, 2)
    first, second = TRUTH.copy(), TRUTH.copy()
    first[:, 20:], second[:, :20] = False, False
    return {
        "PIL 1": grey.convert("1"),
        "PIL L": grey,
        "PIL LA": grey.convert("LA"),
        "PIL P": grey.convert("P"),
        "PIL I;16": Image.fromarray(TRUTH.astype(np.uint16) * 65535),
        "PIL F": Image.fromarray(TRUTH.astype(np.float32)),
        "PIL RGB": grey.convert("RGB"),
        "PIL RGBA, opaque": grey.convert("RGBA"),
        "PIL RGBA, alpha on black": rgba(TRUTH, 0),
        "PIL RGBA, alpha on white": rgba(TRUTH, 255),
        "path": tmp_path / "mask.png",
        "str": str(tmp_path / "mask.png"),
        "numpy bool": TRUTH,
        "numpy uint8": bytes_of(TRUTH),
        "numpy uint8 of 0/1": bytes_of(TRUTH, 1),
        "numpy int64": TRUTH.astype(np.int64),
        "numpy float32": TRUTH.astype(np.float32),
        "numpy hw1": TRUTH[..., None],
        "numpy hw3": colour,
        "numpy hw4": np.asarray(rgba(TRUTH, 7)),
        "numpy float hw3": colour / 255.0,
        "numpy 1hw": TRUTH[None],
        "numpy big-endian": TRUTH.astype(">f4"),
        "numpy not contiguous": np.ascontiguousarray(TRUTH[:, ::-1])[:, ::-1],
        "torch bool 2-D": torch.from_numpy(TRUTH),
        "torch float 3-D": torch.from_numpy(TRUTH)[None].float(),
        "torch half 4-D": torch.from_numpy(TRUTH)[None, None].half(),
        "torch 4-D RGB": torch.from_numpy(colour).permute(2, 0, 1)[None],
        "torch with gradient": torch.from_numpy(TRUTH).float().requires_grad_(True),
        "list, united": [first, Image.fromarray(bytes_of(second))],
        "gradio, two layers": {
            "background": Image.new("RGB", (40, 24)), "layers": [rgba(first, 3), rgba(second, 200)], "composite": None,
        },
        "gradio, arrays": {"background": np.zeros((24, 40, 3), np.uint8), "layers": [np.asarray(rgba(TRUTH, 9))]},
        "gradio, half-transparent brush": {"background": None, "layers": [Image.merge("RGBA", [
            Image.new("L", (40, 24), 255)] * 3 + [Image.fromarray(bytes_of(TRUTH, 90))])]},
    }  # fmt: skip


def test_every_form_is_the_same_mask(tmp_path):
    for name, form in same(tmp_path).items():
        mask = as_mask(form)
        assert mask.dtype == np.bool_ and np.array_equal(mask, TRUTH), name


def test_the_threshold_is_a_half():
    assert as_mask(np.array([[127, 128, 255]], np.uint8)).tolist() == [[False, True, True]]
    assert as_mask(np.array([[0.49999, 0.5, 1.0]])).tolist() == [[False, True, True]]
    assert as_mask(np.array([[0, 1, 1]], np.uint8)).tolist() == [[False, True, True]]
    grey = np.full((2, 2, 3), 0.5)
    assert as_mask(grey).all() and not as_mask(grey - 1e-6).any()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to be seen upright
    turned = Image.fromarray(bytes_of(TRUTH)).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(as_mask(tmp_path / "turned.png"), TRUTH)


def test_a_list_is_one_for_each_or_a_union():
    a, b = np.zeros((2, 8, 8), bool)
    a[1], b[5] = True, True
    assert [m.sum() for m in as_masks([a, b])] == [8, 8] and as_mask([a, b]).sum() == 16
    assert [m.sum() for m in as_masks([[a, b], a])] == [16, 8]
    assert [m.sum() for m in as_masks(torch.from_numpy(np.stack([a, b])))] == [8, 8]
    assert [m.sum() for m in as_masks(np.stack([a, b])[..., None])] == [8, 8]
    assert len(as_masks(a)) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([[0.0, np.nan]]), "NaN"),
        (np.array([[0.0, np.inf]]), "inf"),
        (np.array([[0.0, 255.0]]), "0 to 255: expected 0 to 1"),
        (np.array([[0.0, -0.1]]), "-0.1"),
        (np.array([[-1, 1]]), "-1"),
        (np.array([[0, 256]]), "256"),
        (torch.tensor([[float("nan")]]), "NaN"),
        (torch.zeros(2, 5, 8, 8), r"\(2, 5, 8, 8\)"),
        (torch.zeros(8), r"\(8,\)"),
        (torch.zeros(0, 4), "shape"),
        ([], "empty list"),
        (None, "NoneType is not a mask"),
        (object(), "object is not a mask"),
        ("no such file.png", "cannot be read"),
        ({"background": None, "layers": [], "composite": None}, "nothing is painted"),
        ({"background": None, "layers": [Image.new("RGBA", (4, 4))]}, "nothing is painted"),
        ([np.ones((4, 4)), np.ones((5, 5))], "cannot be united"),
        (np.array([[None, None]]), "array of object is not a mask"),
        (np.array([["a", "b"]]), "is not a mask"),
        (np.ones((2, 2), complex), "complex"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex"),
        ({"background": None, "layers": [None]}, "NoneType is not a picture"),
        ({"background": None, "layers": ["no such file.png"]}, "no such file.png"),
        ({"background": "gone.png", "layers": [Image.new("RGBA", (4, 4), "red")]}, "gone.png"),
    ],
)
def test_what_is_no_mask_says_why(bad, message):
    with pytest.raises(dg.MaskError, match=message) as caught:
        as_mask(bad)
    assert isinstance(caught.value, ValueError)


def layered(colours, alpha):
    image = Image.fromarray(np.broadcast_to(np.asarray(colours, np.uint8), (*TRUTH.shape, 3)).copy())
    image.putalpha(Image.fromarray(np.asarray(alpha, np.uint8)))
    return image


@pytest.mark.parametrize("form", ["picture", "array", "file"])
@pytest.mark.parametrize("least", [254, 253, 200])
def test_alpha_counts_where_it_separates(form, least, tmp_path):
    """An editor's export is opaque but for a breath: its brightness is the mask, not its alpha."""
    alpha = np.full(TRUTH.shape, 255)
    alpha[3, 3], alpha[10, 12] = least, least
    image = layered(bytes_of(TRUTH)[..., None].repeat(3, 2), alpha)
    image.save(tmp_path / "mask.png")
    given = {"picture": image, "array": np.asarray(image), "file": tmp_path / "mask.png"}[form]
    assert np.array_equal(as_mask(given), TRUTH)


def test_a_faint_stroke_says_how_faint():
    for colour in ((0, 0, 0), (255, 255, 255)):
        stroke = layered(colour, bytes_of(TRUTH, 100))
        for form in (stroke, np.asarray(stroke)):
            with pytest.raises(dg.MaskError, match="at most 39%.*opaque brush"):
                as_mask(form)
    assert not as_mask(layered((0, 0, 0), bytes_of(TRUTH, 4))).any()  # what an eraser left


IDS = np.zeros(TRUTH.shape, np.uint8)
IDS[2:8, 2:10], IDS[12:20, 4:30], IDS[1:9, 20:30] = 1, 3, 7


def forms_of_ids(values):
    palette = Image.fromarray(values.astype(np.uint8), "P")
    few = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 200, 200, 200]
    palette.putpalette(few + [224, 224, 192] * 248)
    return {
        "uint8": values, "int64": values.astype(np.int64),
        "tensor": torch.from_numpy(values),
        "L": Image.fromarray(values), "I;16": Image.fromarray(values.astype(np.uint16)),
        "I": Image.fromarray(values.astype(np.int32)), "P": palette,
        "hw3": values[..., None].repeat(3, 2),
    }  # fmt: skip


@pytest.mark.parametrize("ignored", [None, 255], ids=["numbers alone", "and 255 for none of them"])
@pytest.mark.parametrize("form", forms_of_ids(IDS))
def test_numbers_of_objects_are_no_mask(form, ignored):
    values = IDS.copy()
    if ignored:
        values[20:24, 30:40] = ignored
    with pytest.raises(dg.MaskError, match=r"1, 3, 7.*mask == [137]|mask == 1, of 0, 1, 3, 7"):
        as_mask(forms_of_ids(values)[form])
    assert np.array_equal(as_mask(values == 3), values == 3)


def test_one_number_alone_is_told_too():
    with pytest.raises(dg.MaskError, match="brightest is 3 of 255.*mask == 3, of 0, 3"):
        as_mask(np.where(TRUTH, 3, 0))


def test_a_soft_mask_is_not_taken_for_numbers():
    soft = Image.fromarray(bytes_of(TRUTH)).resize((160, 96), Image.Resampling.BICUBIC)
    assert np.array_equal(as_mask(np.asarray(soft)), np.asarray(soft) > 127)
    assert np.array_equal(as_mask(np.where(TRUTH, 235, 16)), TRUTH)  # a video's black and white
    assert np.array_equal(as_mask(np.where(TRUTH, 200, 0)), TRUTH)
    trimap = np.where(TRUTH, 255, 0)
    trimap[2:8, 30:38] = 128
    assert np.array_equal(as_mask(trimap), trimap > 127)


@pytest.mark.parametrize("form", ["L", "RGB", "P", "LA"])
def test_a_dark_stroke_says_how_dark(form):
    image = Image.fromarray(bytes_of(TRUTH, 90)).convert(form)
    with pytest.raises(dg.MaskError, match="brightest is 90 of 255.*Paint white"):
        as_mask(image)
    red = Image.fromarray(bytes_of(TRUTH)[..., None] * np.uint8([1, 0, 0]))
    with pytest.raises(dg.MaskError, match="brightest is 76 of 255"):
        as_mask(red)
    with pytest.warns(UserWarning, match="highest value is 0.4"):
        assert not as_mask(TRUTH * 0.4).any()


def test_black_of_a_jpeg_is_empty(tmp_path):
    Image.fromarray(np.full(TRUTH.shape, 3, np.uint8)).save(tmp_path / "mask.jpg", quality=95)
    assert not as_mask(tmp_path / "mask.jpg").any()
    assert not as_mask(np.zeros(TRUTH.shape, np.uint8)).any()


def test_a_damaged_file_says_why(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with pytest.raises(dg.MaskError, match=r"mask\.png"):
        as_mask(tmp_path / "mask.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(dg.MaskError, match="truncated"), Image.open(tmp_path / "cut.png") as opened:
        as_mask(opened)


def test_a_file_too_large_to_be_meant_says_why(tmp_path, monkeypatch):
    Image.fromarray(bytes_of(TRUTH)).save(tmp_path / "mask.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(dg.MaskError, match=r"mask\.png.*exceeds limit"):
        as_mask(tmp_path / "mask.png")


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_another_size_of_the_same_aspect_fits_and_another_aspect_does_not():
    assert np.array_equal(fit(TRUTH, (48, 80)), TRUTH.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(fit(fit(TRUTH, (48, 80)), (24, 40)), TRUTH)
    assert fit(TRUTH, (25, 41)).shape == (25, 41)
    with pytest.warns(UserWarning, match="the mask is 40x24 and the picture 80x48: the mask is resized"):
        assert np.array_equal(as_mask(TRUTH, (48, 80)), TRUTH.repeat(2, 0).repeat(2, 1))
    for size in ((24, 44), (40, 24), (512, 512)):
        with pytest.raises(dg.MaskError, match="another aspect"):
            fit(TRUTH, size)
        with pytest.raises(dg.MaskError, match="another aspect"):
            as_mask(TRUTH, size)


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 90), st.integers(16, 90), st.integers(0, 10**6), st.booleans())
def test_a_thin_line_never_vanishes(height, width, place, across):
    """One pixel wide, at any place, at any size down to one token."""
    mask = np.zeros((height, width), bool)
    if across:
        mask[place % height] = True
    else:
        mask[:, place % width] = True
    size = (-(-height // 8), -(-width // 8))
    padded = np.zeros((size[0] * 8, size[1] * 8), bool)
    padded[:height, :width] = mask
    grid = size
    while grid != (1, 1):
        tokens = level_mask(padded, size, grid)
        assert tuple(tokens.shape) == grid and (tokens.any(1).all() or tokens.any(0).all() or tokens.any())
        share = tokens.any(1 if across else 0)
        assert share.any()
        grid = (-(-grid[0] // 2), -(-grid[1] // 2))


@pytest.mark.parametrize("side", [512, 768, 1024])
def test_levels_are_the_official_ones_on_the_official_squares(side):
    rng = np.random.default_rng(side)
    mask = np.zeros((side, side), bool)
    for _ in range(6):
        y, x = rng.integers(0, side - 60, 2)
        mask[y : y + rng.integers(1, 60), x : x + rng.integers(1, 60)] = True
    pixels, latent = torch.from_numpy(mask)[None].float(), side // 8
    for level in range(4):
        official = F.max_pool2d(pixels, (8 << level, 8 << level)).round()[0]
        grid = (latent >> level, latent >> level)
        assert torch.equal(level_mask(mask, (latent, latent), grid).float(), official)


def test_odd_latents_halve_with_rounding_up():
    """65 x 97 goes 33 x 49, 17 x 25: the sizes that stride-2 convolutions with padding 1 give."""
    rng = np.random.default_rng(1)
    mask = rng.random((65 * 8, 97 * 8)) > 0.9997
    full = level_mask(mask, (65, 97), (65, 97))
    assert torch.equal(full, torch.from_numpy(mask.reshape(65, 8, 97, 8).any((1, 3))))
    convolution = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    x, grid = torch.zeros(1, 1, 65, 97), (65, 97)
    for expected in ((33, 49), (17, 25), (9, 13)):
        x = convolution(x)
        assert tuple(x.shape[2:]) == expected == level_grid(expected[0] * expected[1], (65, 97))
        step = (2 * grid[0] // grid[0],) * 2
        tokens, finer = level_mask(mask, (65, 97), expected), level_mask(mask, (65, 97), grid)
        for i in range(expected[0]):
            for j in range(expected[1]):
                block = finer[step[0] * i : step[0] * i + 2, step[1] * j : step[1] * j + 2]
                assert bool(tokens[i, j]) == bool(block.any())
        grid = expected


def test_a_grid_that_is_no_level_is_refused():
    with pytest.raises(dg.UnsupportedPipelineError, match="no level"):
        level_mask(np.ones((64, 64), bool), (8, 8), (3, 5))
    with pytest.raises(dg.MaskError, match="another aspect"):
        level_mask(np.ones((512, 512), bool), (64, 96), (32, 48))


# -- growing, feathering, cleaning ----------------------------------------------------------------------------------


def brute_distance(mask):
    ys, xs = np.nonzero(mask)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    return np.sqrt(((y[..., None] - ys) ** 2 + (x[..., None] - xs) ** 2).min(-1).astype(np.float64))


@pytest.mark.parametrize("limit", [0, 1, 4, 9, 60])
def test_distance_growing_and_feathering_against_brute_force(limit):
    rng = np.random.default_rng(limit)
    mask = rng.random((37, 53)) > 0.99
    mask[0, 52] = True  # and at the border
    true = brute_distance(mask)
    found = distance(mask, limit)
    assert np.allclose(found[true <= limit], true[true <= limit], atol=1e-5) and np.isinf(found[true > limit]).all()
    assert np.array_equal(grow(mask, limit), true <= limit)
    soft = feather(mask, limit)
    assert (soft[mask] == 1).all() and (soft[true > limit] == 0).all() and soft.dtype == np.float32
    order = np.argsort(true, axis=None)
    assert (np.diff(soft.ravel()[order]) <= 1e-6).all() and (soft[true <= limit] > 0).all()


def test_an_empty_mask_stays_empty():
    empty = np.zeros((9, 9), bool)
    assert not grow(empty, 5).any() and not feather(empty, 5).any()
    assert not fill_holes(empty).any() and not drop_small(empty, 3).any()


def test_holes_are_filled_and_bays_are_not():
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    mask[4:8, 4:8] = False  # a hole
    mask[6, 8:12] = False  # and now it is open to the outside: a bay
    assert np.array_equal(fill_holes(mask), mask)
    mask[6, 11] = True
    filled = mask.copy()
    filled[4:8, 4:8], filled[6, 8:11] = True, True
    assert np.array_equal(fill_holes(mask), filled)
    spiral = np.zeros((41, 41), bool)
    for i in range(0, 20, 4):
        spiral[i, i : 41 - i] = spiral[40 - i, i : 41 - i] = spiral[i : 41 - i, i] = spiral[i : 41 - i, 40 - i] = True
    assert fill_holes(spiral).all()


def test_specks_are_dropped_by_area():
    mask = np.zeros((10, 30), bool)
    mask[1, 1], mask[3:5, 3:6], mask[0:10, 20:30] = True, True, True
    assert drop_small(mask, 1).sum() == 107 and drop_small(mask, 2).sum() == 106
    assert drop_small(mask, 7).sum() == 100 and drop_small(mask, 101).sum() == 0
