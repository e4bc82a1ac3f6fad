"""Masks: whatever a user hands over, made boolean in one place, and from pixels to the tokens of every layer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .errors import MaskError, UnsupportedPipelineError

THRESHOLD = 0.5
"""From here on, on a scale of 0 to 1, a pixel is masked. 8-bit masks: 128 and more."""

Bools = NDArray[np.bool_]


def as_mask(mask: Any, size: tuple[int, int] | None = None) -> Bools:
    """One mask from anything that stands for one; several are united.

    Args:
        mask: True, 1 or white is masked. A PIL image of any mode (alpha decides if it varies, else luminance; EXIF
            orientation is applied), a path, a numpy array [h, w], [h, w, 1 | 3 | 4] or [n, h, w], a torch tensor
            [h, w], [n, h, w] or [n, 1 | 3 | 4, h, w], the value of a Gradio `ImageEditor` or `ImageMask` (whatever is
            painted on its layers), or a list of such. Arrays are boolean, integer (0/1 or 0...255) or float (0...1).
        size: (height, width) wanted; a mask of the same aspect is brought to it with a warning, a masked pixel never
            gets lost.
    Returns:
        [h, w], boolean.
    Raises:
        MaskError: not a mask, no layer painted, NaN, values outside the range, another aspect, different sizes.
    """
    masks = as_masks(mask, size)
    if any(one.shape != masks[0].shape for one in masks):
        raise MaskError(f"masks of {_sizes(masks)} cannot be united: give all at the picture's size")
    return np.any(masks, axis=0)


def as_masks(masks: Any, size: tuple[int, int] | None = None) -> list[Bools]:
    """One mask for each member of a list, a stack [n, h, w] or a batch; a single mask gives a list of one.

    Args and Raises as `as_mask`; a nested list is one mask, the union of its members.
    """
    if isinstance(masks, (list, tuple)):
        members = cast("Sequence[Any]", masks)
        if not members:
            raise MaskError("an empty list holds no mask: give one mask, or one for each picture")
        return [as_mask(one, size) for one in members]
    planes = _planes(masks)
    if size is None or planes[0].shape == tuple(size):
        return planes
    fitting = [fit(one, size) for one in planes]
    warnings.warn(
        f"the mask is {_sizes(planes)} and the picture {size[1]}x{size[0]}: the mask is resized", stacklevel=3
    )
    return fitting


def fit(mask: Bools, size: tuple[int, int]) -> Bools:
    """`mask` at (height, width) `size`; every target pixel that holds a masked pixel is masked.

    Raises:
        MaskError: another aspect (more than half a target pixel off).
    """
    (height, width), (h, w) = mask.shape, size
    if (height, width) == (h, w):
        return mask
    if 2 * abs(height * w - width * h) > max(height, width):
        raise MaskError(
            f"the mask is {width}x{height} and the picture {w}x{h}, another aspect: make the mask from this picture"
        )
    return _pool(torch.from_numpy(mask), size).numpy()


def _pool(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.adaptive_max_pool2d(mask[None].float(), size)[0] > 0


# -- from anything to planes -------------------------------------------------------------------------------------


def _planes(mask: Any) -> list[Bools]:
    if isinstance(mask, Mapping):
        return [_painted(cast("Mapping[str, Any]", mask))]
    if isinstance(mask, (str, os.PathLike, Image.Image)):
        return [_of_image(_opened(mask))]
    if isinstance(mask, torch.Tensor):
        return _of_array(mask.detach().cpu(), channels=1)
    if isinstance(mask, np.ndarray):
        return _of_array(_tensor(cast("NDArray[Any]", mask)), channels=-1)
    raise MaskError(
        f"a {type(mask).__name__} is not a mask: give a PIL image, a path, an array, a tensor or a list of them"
    )


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    except TypeError as error:
        raise MaskError(f"an array of {values.dtype} is not a mask: give booleans, integers or floats") from error


def _of_image(image: Image.Image) -> Bools:
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() != alpha.max():
            return _binary(torch.tensor(alpha))
        image = image.convert("RGBA").convert("RGB")
    if image.mode.startswith(("I", "F")):
        values = torch.from_numpy(np.array(image, np.float64))
        return _binary(values / (65535 if values.max() > 255 else 255 if values.max() > 1 else 1))
    return _binary(torch.tensor(np.asarray(image.convert("L"))))


def _painted(value: Mapping[str, Any]) -> Bools:
    """Union of what is painted (alpha above 0) on the layers of a Gradio editor."""
    layers = [_alpha(layer) for layer in value.get("layers") or ()]
    layers = [layer for layer in layers if layer.any()]
    if not layers:
        raise MaskError("nothing is painted on the picture: paint over what is to be masked")
    background = value.get("background")
    size = layers[0].shape if background is None else np.asarray(_opened(background)).shape[:2]
    return np.any([fit(layer, cast("tuple[int, int]", size)) for layer in layers], axis=0)


def _alpha(layer: Any) -> Bools:
    image = _opened(layer)
    return np.asarray(image.convert("RGBA"))[..., 3] > 0 if image.has_transparency_data else _of_image(image)


def _opened(picture: Any) -> Image.Image:
    """An image with its pixels, of a path, an array or itself."""
    try:
        if isinstance(picture, (str, os.PathLike)):
            with Image.open(cast("str | os.PathLike[str]", picture)) as opened:
                opened.load()
                return opened.copy()
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        if isinstance(image, Image.Image):
            image.load()  # a file that was opened may turn out to be damaged only now
            return image
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        name = "the mask" if isinstance(picture, (Image.Image, np.ndarray)) else repr(os.fspath(picture))
        raise MaskError(f"{name} cannot be read as a mask: {error}") from error
    raise MaskError(f"a {type(picture).__name__} is not a picture: give PIL images, paths or arrays")


def _of_array(values: torch.Tensor, channels: int) -> list[Bools]:
    """Planes of an array with its channels, if it has any, at dimension `channels` (1 behind a batch, or -1)."""
    shape = tuple(values.shape)
    if values.ndim == 3 and channels == -1 and shape[-1] in (1, 3, 4):
        values = values[None]
    if values.ndim == 4 and shape[channels] in (1, 3, 4):
        values = _grey(values.movedim(channels, -1))
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise MaskError(f"an array of shape {shape} is not a mask: expected [h, w], with channels or a batch")
    return [_binary(plane) for plane in values]


def _grey(values: torch.Tensor) -> torch.Tensor:
    """[n, h, w] of [n, h, w, 1 | 3 | 4]: alpha where it varies, else luminance."""
    if values.shape[-1] == 1:
        return values[..., 0]
    if values.shape[-1] == 4 and bool((values[..., 3] != values[0, 0, 0, 3]).any()):
        return values[..., 3]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return _unit(values[..., :3]) @ weights


def _binary(values: torch.Tensor) -> Bools:
    # a luminance of weights that add up to 1 may miss the threshold by a rounding error
    return (_unit(values) >= THRESHOLD - 1e-9).numpy()


def _unit(values: torch.Tensor) -> torch.Tensor:
    """Values as float64 between 0 and 1: floats as they are, integers of 0 and 1 too, other integers by 255."""
    if values.is_complex():
        raise MaskError("complex numbers are no mask: give booleans, integers or floats")
    real = values.to(torch.float64)
    low, high = float(real.amin()), float(real.amax())  # NaN survives both
    most = 1.0 if values.dtype.is_floating_point or high <= 1 else 255.0
    if not (low >= 0 and high <= most):
        raise MaskError(
            f"a mask of {str(values.dtype).removeprefix('torch.')} holds values from {low:g} to {high:g}: expected "
            f"0 to {most:g} (floats 0...1, integers 0/1 or 0...255, no NaN)"
        )
    return real / most


def _sizes(masks: Sequence[Bools]) -> str:
    return ", ".join(sorted({f"{mask.shape[1]}x{mask.shape[0]}" for mask in masks}))


# -- from latents to tokens --------------------------------------------------------------------------------------


def level_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the level with `tokens` tokens below a full grid of `size`.

    A UNet halves with rounding up at every level (stride 2, padding 1), so 65x97 goes 33x49, 17x25.

    Raises:
        UnsupportedPipelineError: no level has that many tokens (tokens were merged or appended).
    """
    height, width = size
    while height * width > tokens and height * width > 1:
        height, width = halved((height, width))
    if height * width != tokens:
        raise UnsupportedPipelineError(
            f"a layer has {tokens} tokens, which is no level of a {size[0]}x{size[1]} latent: "
            "remove whatever merges or appends image tokens (tomesd.remove_patch(pipe)) and try again"
        )
    return height, width


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """The grid one level below."""
    return -(-size[0] // 2), -(-size[1] // 2)


def level_mask(mask: Bools, size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """A pixel mask on the token grid of a level below the latent grid `size`: a token is masked if any of it is.

    Args:
        mask: [H, W] pixels, of the latent's aspect.
        size: (h, w) of the latent. grid: (h, w) of the level, one that halving `size` reaches.
    Returns:
        [h, w] boolean on the CPU.
    Raises:
        MaskError: the mask's aspect is not the latent's.
    """
    tokens = torch.from_numpy(fit(mask, size))
    while tuple(tokens.shape) != grid:
        if tokens.numel() == 1:
            raise UnsupportedPipelineError(f"{grid[0]}x{grid[1]} tokens are no level of a {size[0]}x{size[1]} latent")
        tokens = F.max_pool2d(tokens[None].float(), 2, ceil_mode=True)[0] > 0
    return tokens
