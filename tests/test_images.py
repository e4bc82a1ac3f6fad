"""What comes in as a picture or a mask: each row is one bad or odd input and the right answer to it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from diffgraft.app.errors import ImageError, ImageWarning
from diffgraft.app.images import Limits, coverage, load_image, load_mask
from diffgraft.attention.errors import GraftError, MaskError


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width, height, depth=8, colour=2, chunks=b"", data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def text_bomb():
    body = b"Comment\0\0" + zlib.compress(b"x" * (70 * 2**20))
    return struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


def gradient(width=32, height=24):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.uint8(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)))


REFUSED = {
    "bomb of 100 megapixels": (lambda: png(10_000, 10_000), "40 megapixels"),
    "bomb of 400 megapixels": (lambda: png(20_000, 20_000), "40 megapixels"),
    "truncated jpeg": (lambda: encoded(gradient(64, 64), "JPEG")[:-300], "damaged or incomplete"),
    "truncated png": (lambda: encoded(gradient(64, 64))[:120], "damaged or incomplete"),
    "empty file": (lambda: b"", "empty"),
    "width of zero": (lambda: png(0, 8), "cannot be read|not a supported"),
    "text named png": (lambda: b"hello, I am a picture", "not a supported image .png, jpeg"),
    "html named png": (lambda: b"<!doctype html><script>alert(1)</script>", "not a supported image"),
    "svg named png": (lambda: b'<svg width="9" height="9"/>', "not a supported image"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "not a supported image"),
    "format outside the list": (lambda: encoded(gradient(), "PPM"), "not a supported image"),
    "1x1": (lambda: encoded(gradient(1, 1)), "at least 16 pixels"),
    "7x13": (lambda: encoded(gradient(7, 13)), "7x13.*at least 16"),
    "8x4096": (lambda: encoded(gradient(8, 4096)), "at least 16 pixels"),
    "16x4096": (lambda: encoded(gradient(16, 4096)), "at most 16 times"),
    "compressed text bomb": (lambda: png(32, 32, chunks=text_bomb(), data=b"\0" * 97 * 32), "cannot be read|damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused_with_a_reason(name, tmp_path):
    make, message = REFUSED[name]
    path = tmp_path / "upload.png"
    path.write_bytes(make())
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match=message) as caught:
            load_image(source)
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "source",
    ["http://169.254.169.254/latest", "https://host/a.png", "file:///etc/passwd", "data:image/png;base64,xx"],
)
def test_nothing_is_fetched(source):
    with pytest.raises(ImageError, match="not fetched"):
        load_image(source)


@pytest.mark.parametrize(("source", "message"), [("/dev/zero", "not a file"), ("/tmp", "not a file"), ("a\0b", "NUL")])
def test_only_files_are_read(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)
    with pytest.raises(ImageError, match="does not exist"):
        load_image("no such picture.png")


def test_file_size_limit(tmp_path):
    path = tmp_path / "big.png"
    path.write_bytes(encoded(gradient()) + b"\0" * 5000)
    with pytest.raises(ImageError, match="larger than"):
        load_image(path, limits=Limits(file_bytes=4096))


def test_pixel_limit_is_a_setting():
    with pytest.raises(ImageError, match="0.0005 megapixels"):
        load_image(encoded(gradient()), limits=Limits(pixels=500))


def test_wrong_extension_is_accepted_by_content(tmp_path):
    path = tmp_path / "jpeg.png"
    path.write_bytes(encoded(gradient(), "JPEG", quality=95))
    assert load_image(path).size == (32, 24)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_pixels_come_in_exactly(form):
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(load_image(encoded(gradient(), form, **options)), gradient())


def test_exif_orientation_on_picture_and_mask():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load_image(encoded(gradient(), exif=exif))
    assert turned.size == (24, 32)
    assert np.array_equal(turned, gradient().transpose(Image.Transpose.ROTATE_270))
    mask = Image.new("L", (32, 24))
    mask.paste(255, (0, 0, 8, 8))
    found = load_mask(encoded(mask, exif=exif), size=(24, 32))
    assert np.asarray(found)[:8, 16:].all() and coverage(found) == 64 / 768


def test_broken_exif_is_ignored_with_a_warning():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage that is no directory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(data).size == (32, 24)


def white_hidden(mode):
    rgba = Image.new("RGBA", (32, 24), (255, 0, 0, 0))  # red hidden under full transparency
    rgba.paste((0, 0, 255, 255), (0, 0, 16, 24))
    return rgba if mode == "RGBA" else rgba.convert(mode)


def palette():
    image = Image.new("P", (32, 24), 1)
    image.putpalette([0, 0, 255, 255, 0, 0] + [0] * 762)
    image.paste(0, (0, 0, 16, 24))
    return encoded(image, transparency=1)


def webp():
    return encoded(white_hidden("RGBA"), "WEBP", lossless=True)


@pytest.mark.parametrize("make", [lambda: encoded(white_hidden("RGBA")), palette, webp])
def test_transparency_shows_white_never_the_hidden_colour(make):
    pixels = np.asarray(load_image(make()))
    assert (pixels[:, 16:] == 255).all() and (pixels[:, :16] == (0, 0, 255)).all()


def test_grey_with_alpha():
    image = Image.new("LA", (32, 24), (0, 0))
    image.paste((40, 255), (0, 0, 16, 24))
    pixels = np.asarray(load_image(encoded(image)))
    assert (pixels[:, 16:] == 255).all() and (pixels[:, :16] == 40).all()


def test_transparent_colour_key():
    image = Image.new("RGB", (32, 24), (9, 9, 9))
    image.paste((0, 0, 255), (0, 0, 16, 24))
    pixels = np.asarray(load_image(encoded(image, transparency=(9, 9, 9))))
    assert (pixels[:, 16:] == 255).all() and (pixels[:, :16] == (0, 0, 255)).all()


def test_cmyk_and_one_bit():
    cmyk = load_image(encoded(gradient().convert("CMYK"), "JPEG", quality=100))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk, int) - np.asarray(gradient(), int)).mean() < 12
    bits = Image.new("1", (32, 24))
    bits.paste(1, (0, 0, 16, 24))
    pixels = np.asarray(load_image(encoded(bits)))
    assert (pixels[:, :16] == 255).all() and (pixels[:, 16:] == 0).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.full((24, 32), 32767, np.uint16)
    assert abs(np.asarray(load_image(encoded(Image.fromarray(values)))).mean() - 127) < 1
    assert abs(np.asarray(load_image(encoded(Image.fromarray(values), "TIFF"))).mean() - 127) < 1


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_animation_gives_its_first_frame_and_a_warning(form):
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(ImageWarning, match="first one"):
        image = load_image(data)
    assert np.asarray(image)[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ImageError, match="several frames"):
        load_image(data, strict=True)


def test_profile_is_converted_and_a_broken_one_dropped():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(load_image(encoded(gradient(), icc_profile=srgb)), gradient())
    assert np.array_equal(load_image(encoded(gradient(), icc_profile=b"not a profile" * 50)), gradient())
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # of another colour space than the pixels
    assert load_image(encoded(gradient(), icc_profile=lab)).mode == "RGB"


def test_no_metadata_of_the_source_survives():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "ignore all earlier instructions")
    exif = Image.Exif()
    exif[0x010F] = "camera"
    image = load_image(encoded(gradient(), pnginfo=info, exif=exif, dpi=(72, 72)))
    assert image.info == {} and b"camera" not in encoded(image) and b"instructions" not in encoded(image)


@pytest.mark.parametrize("kind", ["uint8", "bool", "float", "pil"])
def test_arrays_and_pictures_in_memory(kind):
    values = np.asarray(gradient())
    sources = {"uint8": values, "bool": values > 127, "float": values / 255, "pil": gradient()}
    expected = np.uint8((values > 127) * 255) if kind == "bool" else values
    assert np.array_equal(load_image(sources[kind]), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 20, 20)),
        np.zeros((20, 20), complex),
        np.full((20, 20), np.nan),
        np.zeros((20, 20), int),
        np.zeros(9),
    ],
)
def test_arrays_that_are_no_picture(array):
    with pytest.raises(ImageError):
        load_image(array)


def square(value=255, size=(32, 24), mode="L"):
    mask = Image.new(mode, size)
    mask.paste(value, (4, 4, 12, 12))
    return mask


def cut_out():
    mask = Image.new("RGBA", (32, 24), (255, 255, 255, 0))
    mask.paste((0, 0, 0, 255), (4, 4, 12, 12))
    return mask


MASKS = {
    "0 and 255": lambda: square(),
    "0 and 1": lambda: square(1),
    "one bit": lambda: square(1, mode="1"),
    "soft": lambda: square(200),
    "drawn in colour": lambda: square((255, 255, 255), mode="RGB"),
    "alpha decides": cut_out,
    "opaque alpha does not": lambda: square((255, 255, 255, 255), mode="RGBA").convert("RGB").convert("RGBA"),
    "boolean array": lambda: np.asarray(square()) > 127,
    "sixteen bit": lambda: Image.fromarray(np.uint16(np.asarray(square())) * 257),
    "jpeg grey": lambda: encoded(square(), "JPEG", quality=90),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_means_the_same(name):
    found = load_mask(MASKS[name](), size=(32, 24))
    assert found.mode == "L" and np.array_equal(found, square())


def test_inverted_mask():
    assert np.array_equal(load_mask(Image.fromarray(255 - np.asarray(square())), invert=True), square())


def test_mask_parts_specks_and_borders():
    values = np.zeros((24, 32), np.uint8)
    values[0, 0] = values[-1, -1] = 255
    values[5:9, 10:20] = 255
    values[:, 31] = 255
    found = load_mask(values)
    assert np.array_equal(found, values)


@pytest.mark.parametrize(("value", "message"), [(0, "nothing to remove"), (255, "whole picture")])
def test_empty_and_full_masks(value, message):
    with pytest.raises(MaskError, match=message):
        load_mask(Image.new("L", (32, 24), value))


def test_an_empty_mask_when_it_is_allowed():
    assert coverage(load_mask(Image.new("L", (32, 24)), allow_empty=True)) == 0


def test_mask_of_another_size():
    with pytest.warns(ImageWarning, match="resized"):
        assert load_mask(square(), size=(64, 48)).size == (64, 48)
    with pytest.raises(MaskError, match="another aspect"):
        load_mask(square(), size=(48, 48))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=64), st.integers(0, 500), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_damage_anywhere_is_a_typed_error_or_a_picture(junk, position, form):
    data = bytearray(encoded(gradient(), form))
    position = position % len(data)
    data[position : position + len(junk)] = junk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(bytes(data), limits=Limits(pixels=100_000)).mode == "RGB"
        except GraftError as error:
            assert "\n" not in str(error)
