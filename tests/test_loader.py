"""Pictures as people really have them: what the eye sees in a viewer is what the model gets, or an error says why."""

from __future__ import annotations

import io
import warnings

import numpy as np
import odd_pictures
import pytest
import tiny
from PIL import Image, ImageCms

import diffgraft as dg
from diffgraft.app.images import load_image
from diffgraft.attention.errors import ImageError, ImageWarning
from diffgraft.attention.masks import as_mask
from diffgraft.attention.pictures import as_picture, as_rgb
from diffgraft.pipelines.tasks.region import paste

PROFILE = odd_pictures.swapped()


def ramp(width=32, height=24):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60)], -1).astype(np.uint8)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def near(found, expected, most=3):
    return int(np.abs(np.asarray(found, int) - np.asarray(expected, int)).max()) <= most


def with_profile():
    rgb = Image.fromarray(ramp())
    few = rgb.quantize(16, dither=Image.Dither.NONE)
    opaque = rgb.copy()
    opaque.putalpha(255)
    half = rgb.copy()
    half.putalpha(Image.fromarray(np.tile(np.uint8([255, 0]).repeat(16), (24, 1))))
    return {
        "RGB": (rgb, ramp()[..., ::-1]),
        "RGBA, opaque": (opaque, ramp()[..., ::-1]),
        "RGBA, half clear": (half, np.where(np.arange(32)[None, :, None] < 16, ramp()[..., ::-1], 255)),
        "P": (few, np.asarray(few.convert("RGB"))[..., ::-1]),
    }


@pytest.mark.parametrize("read", [load_image, as_rgb], ids=["commands", "tasks"])
@pytest.mark.parametrize("name", with_profile())
def test_a_profile_is_followed_in_every_mode(name, read):
    image, expected = with_profile()[name]
    found = read(saved(image, icc_profile=PROFILE))
    assert found.mode == "RGB" and found.info == {} and near(found, expected)


def test_srgb_is_known_by_what_it_does_not_by_its_name():
    """sRGB's own profile changes no pixel; one that calls itself sRGB and is another is followed."""
    assert b"sRGB" in PROFILE.replace(b"\0", b"")
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(as_rgb(saved(Image.fromarray(ramp()), icc_profile=plain)), ramp())


def test_a_profile_that_cannot_be_used_is_said():
    with pytest.warns(ImageWarning, match="sRGB is assumed"):
        found = as_rgb(saved(Image.fromarray(ramp()), icc_profile=b"not a profile" * 50))
    assert np.array_equal(found, ramp())


def test_an_edited_picture_keeps_its_colour_space():
    """The model sees sRGB; what it makes goes back in the picture's own colours, and no other byte changes."""
    source = as_picture(saved(Image.fromarray(ramp()), icc_profile=PROFILE))
    assert source.info["icc_profile"] == PROFILE and np.array_equal(source, ramp())
    opacity = np.zeros((24, 32))
    opacity[4:12, 4:12] = 1
    made = paste(source, Image.new("RGB", (32, 24), (200, 30, 90)), (0, 0), opacity)
    assert made.info["icc_profile"] == PROFILE
    assert near(np.asarray(made)[4:12, 4:12], (90, 30, 200)) and np.array_equal(
        np.asarray(made)[opacity == 0], ramp()[opacity == 0]
    )
    assert near(as_rgb(made).getpixel((6, 6)), (200, 30, 90))


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


@pytest.mark.parametrize("role", ["content", "style", "negative"])
def test_stylize_sees_srgb(pipe, role):
    """A picture with a profile gives what its conversion gives, as content, as style and as negative."""
    tagged = Image.fromarray(ramp(32, 32))
    tagged.info["icc_profile"] = PROFILE
    asked = {
        "content": Image.new("RGB", (32, 32), (90, 40, 20)),
        "style": Image.new("RGB", (32, 32), (30, 90, 200)),
        "negative": None,
    }
    how = {"seed": 1, "steps": 2, "iterations": 0}
    made = [dg.stylize(pipe, **(asked | {role: picture}), **how) for picture in (as_rgb(tagged), tagged)]
    assert np.array_equal(*made) and "icc_profile" not in made[1].info
    if role == "content":
        untouched = dg.stylize(pipe, **(asked | {role: tagged}), strength=0, **how)
        assert near(untouched, ramp(32, 32)[..., ::-1]) and "icc_profile" not in untouched.info


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_tiff_is_turned_as_its_png(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = np.where(np.arange(32)[None] < 12, 255, np.arange(24)[:, None] * 4).astype(np.uint8)
    image = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    expected = np.asarray(as_rgb(image.copy()).transpose(turned[orientation]))
    path = tmp_path / "page.tif"
    for compression in (None, "tiff_lzw"):
        image.save(path, exif=exif, compression=compression)
        assert np.array_equal(as_rgb(path), expected)
        assert np.array_equal(as_mask(path), expected[..., 0] > 127)
        with Image.open(path) as lazy:
            assert np.array_equal(as_rgb(lazy), expected)


DAMAGED = [b"Exif\0\0XX\0*\0\0\0\x08\0\1", b"Exif\0\0MM\0*\x08\x01\0", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3"]


@pytest.mark.parametrize("block", DAMAGED)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_is_one_warning(tmp_path, block, form):
    shape = np.zeros((24, 32), np.uint8)
    shape[4:12, 4:20] = 255
    path = tmp_path / "photo"
    path.write_bytes(saved(Image.fromarray(np.stack([shape] * 3, -1)), form, exif=block, quality=95))
    for read in (as_rgb, as_picture, load_image, as_mask):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = read(path)
        said = {str(w.message) for w in heard}  # Python shows equal ones once
        assert len(said) == 1 or (form == "JPEG" and not said), said
        assert near(found if read is not as_mask else np.uint8(found)[..., None] * 255, shape[..., None], 40)


def test_deep_greys_are_scaled():
    deep = np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype(np.uint16)
    assert near(np.asarray(as_rgb(Image.fromarray(deep)))[..., 0], deep / 257, 1)
    assert near(as_rgb(Image.fromarray((deep // 257).astype(np.int32))).getchannel(0), deep // 257, 0)
    dark = as_rgb(saved(Image.fromarray(np.full((24, 32), 200, np.uint16)), "TIFF"))
    assert np.asarray(dark).max() == 1  # 200 of 65535, not of 255
    for values in (np.full((24, 32), -3, np.int32), np.full((24, 32), 70_000, np.int32)):
        with pytest.raises(ImageError, match="scale it"):
            as_rgb(Image.fromarray(values))
    with pytest.raises(ImageError, match="scale it"):
        as_rgb(Image.fromarray(np.full((24, 32), np.nan, np.float32)))


def test_a_key_colour_of_a_deep_grey_is_transparent():
    deep = np.full((24, 32), 500, np.uint16)
    deep[:, :8] = 40_000
    found = np.asarray(as_rgb(saved(Image.fromarray(deep), transparency=500)))
    assert near(found[:, :8], 40_000 / 257) and (found[:, 8:] == 255).all()


def test_lab_is_colour():
    lab = ImageCms.profileToProfile(
        Image.fromarray(ramp()), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(np.asarray(as_rgb(lab), int) - ramp()).mean() < 4  # eight bits of LAB are coarse


def test_what_is_no_picture_says_so():
    for strange in (None, 5, object(), [1]):
        with pytest.raises(dg.SettingTypeError, match="is not a picture"):
            load_image(strange)
    with pytest.raises(ImageError, match="outside 0...1"):
        load_image(np.full((24, 32), 3.0))
    with pytest.raises(ImageError, match="not fetched"):
        as_picture("https://host/a.png")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    assert np.array_equal(load_image("~/a.png"), ramp()) and as_picture("~/a.png").size == (32, 24)
    with pytest.raises(ImageError, match="does not exist"):
        as_picture("~nobody-of-that-name/a.png")


def test_the_first_page_is_said():
    pages = [Image.new("L", (32, 24), value) for value in (10, 200)]
    with pytest.warns(ImageWarning, match="first one"):
        assert as_rgb(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])).getpixel((0, 0)) == (10,) * 3
