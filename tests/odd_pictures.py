"""A generator of pictures and masks as people have them, each with what it must come in as, computed in plain numpy."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageCms

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
FORMATS = ("memory", "PNG", "TIFF", "TIFF lzw", "JPEG", "WEBP", "GIF", "BMP", "PPM")
WRITES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": MODES,
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB"),
}
EXIF = {"JPEG", "PNG", "WEBP", "TIFF"}
PROFILED = {"memory", "PNG", "TIFF", "JPEG", "WEBP"}


def swapped() -> bytes:
    """A profile whose red is sRGB's blue: whoever leaves it out is seen at once."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data)


def linear_grey() -> bytes:
    """A profile of grey in which numbers are light itself."""
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    tags, body, at = [], b"", 128 + 4 + 12 * 3
    for name, part in ((b"desc", text), (b"wtpt", white), (b"kTRC", curve)):
        part += bytes(-len(part) % 4)
        tags.append(name + struct.pack(">II", at + len(body), len(part)))
        body += part
    data = struct.pack(">I", 3) + b"".join(tags) + body
    head = struct.pack(">I4sI4s4s4s", 128 + len(data), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + data


PROFILES = {
    "none": b"",
    "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "swapped": swapped(),
    "linear grey": linear_grey(),
    "LAB": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    "junk": b"not a profile" * 50,
    "cut": swapped()[:200],
}


@dataclass
class Odd:
    """A source for the loader and what it shows: upright sRGB over white, float [h, w, 3]."""

    source: Any
    shows: np.ndarray
    mode: str
    form: str
    tolerance: float
    said: str


def native(mode: str, grey: np.ndarray, rgb: np.ndarray, alpha: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """An image of a mode and the colours that it stands for, before a profile and alpha."""
    of_grey = np.repeat(grey[..., None], 3, 2)
    if mode == "1":
        return Image.fromarray(grey > 127), np.where(of_grey > 127, 255, 0)
    if mode in ("L", "LA"):
        image = Image.fromarray(grey)
        if mode == "LA":
            image = Image.merge("LA", [image, Image.fromarray(alpha)])
        return image, of_grey
    if mode == "P":
        table = np.random.default_rng(int(grey[0, 0])).integers(0, 256, (16, 3)).astype(np.uint8)
        image = Image.fromarray(grey // 16, "P")
        image.putpalette(table.ravel().tolist())
        return image, table[grey // 16]
    if mode in ("RGB", "RGBA"):
        return Image.fromarray(np.dstack([rgb, alpha]) if mode == "RGBA" else rgb), rgb
    if mode == "CMYK":
        ink = np.dstack([255 - rgb, alpha // 2])
        light = 255 - np.minimum(255, ink[..., 3:].astype(float) + ink[..., :3] * (255.0 - ink[..., 3:]) / 255)
        return Image.fromarray(ink, "CMYK"), light
    if mode == "I;16":
        deep = grey.astype(np.uint16) * 257 - (grey > 0) * (alpha.astype(np.uint16) // 2)
        return Image.fromarray(deep), np.repeat(deep[..., None], 3, 2) / 257
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32)), of_grey
    return Image.fromarray(grey.astype(np.float32) / 255), of_grey


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """As a viewer shows an orientation of the EXIF standard."""
    flip, turn = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}.get(orientation, (0, 0))
    return np.rot90(values[:, ::-1] if flip else values, turn)


def through(profile: str, colours: np.ndarray, mode: str) -> np.ndarray:
    """Colours in sRGB of those in a profile that suits the mode; one that does not says nothing."""
    grey = mode in ("1", "L", "LA", "I;16", "I", "F")
    if profile == "swapped" and not grey and mode != "CMYK":
        return colours[..., ::-1]
    if profile == "linear grey" and grey:
        light = colours / 255
        return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return colours


@st.composite
def pictures(draw: Any) -> Odd:
    """Modes x depths x profiles x orientations x alpha forms x formats x ways to hand them over."""
    width, height = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    y, x = np.mgrid[:height, :width]
    kind = draw(st.sampled_from(["flat", "ramp", "noise"]))
    form = draw(st.sampled_from(FORMATS))
    kind = "ramp" if form == "JPEG" and kind == "noise" else kind
    rgb = {
        "flat": lambda: np.broadcast_to(rng.integers(0, 256, 3), (height, width, 3)),
        "ramp": lambda: np.dstack([x * 255 // width, y * 255 // height, np.full_like(x, int(rng.integers(256)))]),
        "noise": lambda: rng.integers(0, 256, (height, width, 3)),
    }[kind]().astype(np.uint8)  # fmt: skip
    alpha = {
        "opaque": lambda: np.full((height, width), 255),
        "breath": lambda: 255 - (rng.random((height, width)) < 0.1) * 2,
        "half": lambda: np.where(x < width / 2, 255, 0), "soft": lambda: rng.integers(0, 256, (height, width)),
        "clear": lambda: np.zeros((height, width)),
    }[draw(st.sampled_from(["opaque", "breath", "half", "soft", "clear"]))]().astype(np.uint8)  # fmt: skip
    name = form.split()[0]
    mode = draw(st.sampled_from(MODES if name == "memory" else WRITES[name]))
    image, colours = native(mode, rgb[..., 0].copy(), rgb, alpha)
    opacity = alpha if mode in ("LA", "RGBA") else np.full((height, width), 255)
    options: dict[str, Any] = {}
    profile = draw(st.sampled_from(sorted(PROFILES))) if name in PROFILED else "none"
    if profile != "none":
        options["icc_profile"] = PROFILES[profile]
    key = name == "PNG" and mode in ("L", "P", "RGB") and draw(st.booleans())
    if key:
        place = (int(rng.integers(height)), int(rng.integers(width)))
        raw = np.asarray(image)
        chosen = raw[place]
        options["transparency"] = tuple(int(v) for v in chosen) if mode == "RGB" else int(chosen)
        opacity = np.where((raw == chosen).all(-1) if mode == "RGB" else raw == chosen, 0, 255)
    orientation = draw(st.integers(0, 9)) if name in EXIF and draw(st.booleans()) else 1
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if form == "TIFF lzw":  # libtiff writes no other ones
        orientation = min(max(1, orientation), 8)
        options.pop("exif", None)
    if form == "TIFF lzw" and orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if form == "TIFF lzw":
        options["compression"] = "tiff_lzw"
    if form == "WEBP":
        options |= {"lossless": True, "exact": True}
    if form == "JPEG":
        options |= {"quality": 98, "subsampling": 0}
    colours = through(profile, np.asarray(colours, float), mode)
    shows = turned(colours * (opacity[..., None] / 255) + 255 * (1 - opacity[..., None] / 255), orientation)
    tolerance = {"JPEG": 14.0}.get(form, 1.5) + {"swapped": 4, "linear grey": 9}.get(profile, 0)
    if name == "memory":
        image.info |= options
        source: Any = image
    else:
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        source = draw(st.sampled_from(["path", "bytes", "lazy"])), buffer.getvalue()
    said = f"{form} {mode} {width}x{height} {kind} {profile} orientation {orientation} key {key}"
    return Odd(source, shows, mode, form, tolerance, said)


@st.composite
def damaged(draw: Any) -> bytes:
    """A file with bytes changed, cut off, or put in anywhere."""
    odd = draw(pictures().filter(lambda odd: odd.form != "memory"))
    data = bytearray(odd.source[1])
    at = draw(st.integers(0, len(data) - 1))
    how = draw(st.sampled_from(["change", "cut", "insert", "drop"]))
    junk = draw(st.binary(min_size=1, max_size=40))
    if how == "cut":
        return bytes(data[:at])
    data[at : at + {"change": len(junk), "insert": 0, "drop": draw(st.integers(1, 60))}[how]] = (
        b"" if how == "drop" else junk
    )
    return bytes(data)


@dataclass
class OddMask:
    """A mask and what it must be: the truth, everything or nothing; None is an error that says why."""

    source: Any
    is_: np.ndarray | None
    said: str


DTYPES = ("bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64", ">i4", ">f8")


@st.composite
def masks(draw: Any) -> OddMask:
    """Two levels, with a breath of alpha or not, in every type: the threshold is a half of the type's white."""
    height, width = draw(st.integers(4, 20)), draw(st.integers(4, 20))
    truth = np.zeros((height, width), bool)
    top, left = draw(st.integers(0, height - 2)), draw(st.integers(0, width - 2))
    truth[top : top + draw(st.integers(1, height)), left : left + draw(st.integers(1, width))] = True
    low, high = sorted([draw(st.integers(0, 255)), draw(st.integers(0, 255))])
    if draw(st.booleans()):
        low, high = draw(st.sampled_from([(0, 1), (0, 255), (0, 3), (0, 127), (0, 128), (16, 235)]))
    values = np.where(truth, high, low)
    most = int(values.max())
    expected = values >= (1 if most <= 1 else 128)
    dark = 1 < most < 128
    carrier = draw(st.sampled_from(["array", "picture", "rgb", "alpha", "breath"]))
    said = f"{carrier} {low} {high} {height}x{width}"
    if carrier == "array":
        kind = draw(st.sampled_from(DTYPES))
        floats = "f" in kind.replace("float", "f")[:2]
        if kind == "bool":
            return OddMask(truth, truth, said)
        if kind == "int8" and most > 127:
            kind = "uint8"
        if floats:
            values = values / 255
            return OddMask(values.astype(kind), values.astype(kind).astype(float) >= 0.5, f"{said} {kind}")
        return OddMask(values.astype(kind), None if dark else expected, f"{said} {kind}")
    grey = values.astype(np.uint8)
    if carrier == "picture":
        return OddMask(Image.fromarray(grey), None if dark else expected, said)
    if carrier == "rgb":
        return OddMask(Image.fromarray(np.repeat(grey[..., None], 3, 2)), None if dark else expected, said)
    if carrier == "breath":
        alpha = np.full(truth.shape, 255, np.uint8)
        alpha[0, 0], alpha[-1, -1] = draw(st.integers(128, 255)), draw(st.integers(128, 255))
        source = Image.fromarray(np.dstack([grey, grey, grey, alpha]))
        return OddMask(source, None if dark else expected, said)
    colour = np.full((*truth.shape, 3), draw(st.integers(0, 255)), np.uint8)
    source = Image.fromarray(np.dstack([colour, grey]))
    separates = (grey >= 128).any() and not (grey >= 128).all()
    if separates:
        return OddMask(source, grey >= 128, said)
    if grey.max() < 128 and grey.max() != grey.min():
        return OddMask(source, np.zeros_like(truth) if grey.max() <= 15 else None, said)
    shade = int(colour[0, 0, 0])
    return OddMask(source, None if 1 < shade < 128 else np.full(truth.shape, shade >= 1), said)
