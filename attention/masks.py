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
from PIL import Image

from .binary import NOISE, Bools, binary, refuse_labels, separated, unit
from .colours import alpha_of
from .errors import ImageError, MaskError, SettingTypeError, UnsupportedPipelineError
from .pictures import opened


def as_mask(mask: Any, size: tuple[int, int] | None = None) -> Bools:
    """One mask from anything that stands for one; several are united.

    Args:
        mask: True, 1 or white is masked. A PIL image of any mode (alpha decides where it separates, else luminance;
            EXIF orientation is applied), a path, a numpy array [h, w], [h, w, 1 | 3 | 4] or [n, h, w], a torch tensor
            [h, w], [n, h, w] or [n, 1 | 3 | 4, h, w], the value of a Gradio `ImageEditor` or `ImageMask` (whatever is
            painted on its layers), or a list of such. Arrays are boolean, integer (0/1 or 0...255) or float (0...1).
        size: (height, width) wanted; a mask of the same aspect is brought to it with a warning, a masked pixel never
            gets lost.
    Returns:
        [h, w], boolean.
    Raises:
        MaskError: not a mask, no layer painted, NaN, values outside the range, numbers of objects, painted too dark to
            count, another aspect, different sizes.
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
    alpha = alpha_of(image)
    if alpha is not None:
        found = separated(torch.tensor(np.asarray(alpha)))
        if found is not None:
            return found
        image = image if image.mode.startswith(("I", "F")) else image.convert("RGBA").convert("RGB")
    if image.mode == "P":
        refuse_labels(image)
    if image.mode.startswith(("I", "F")):
        values = torch.from_numpy(np.array(image, np.float64))
        if image.mode == "F":
            return binary(values / (255 if values.max() > 1 else 1))
        return binary(values.long(), deep=True)
    try:
        values = torch.tensor(np.asarray(image.convert("L")))
    except ValueError:
        raise MaskError(f"a picture of mode {image.mode!r} is not a mask: convert it to L first") from None
    return binary(values, noise=NOISE if image.format in ("JPEG", "MPO", "WEBP") else 0)


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
    alpha = alpha_of(image)
    return _of_image(image) if alpha is None else np.asarray(alpha) > 0


def _opened(picture: Any) -> Image.Image:
    try:
        return opened(picture)
    except (ImageError, SettingTypeError) as error:
        raise MaskError(f"the mask cannot be read: {error}") from error


def _of_array(values: torch.Tensor, channels: int) -> list[Bools]:
    """Planes of an array with its channels, if it has any, at dimension `channels` (1 behind a batch, or -1)."""
    shape = tuple(values.shape)
    if values.ndim == 3 and channels == -1 and shape[-1] in (1, 3, 4):
        values = values[None]
    if values.ndim == 4 and shape[channels] in (1, 3, 4):
        return [_of_channels(plane) for plane in values.movedim(channels, -1)]
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise MaskError(f"an array of shape {shape} is not a mask: expected [h, w], with channels or a batch")
    return [binary(plane) for plane in values]


def _of_channels(values: torch.Tensor) -> Bools:
    """[h, w] of [h, w, 1 | 3 | 4]: alpha where it separates, else luminance."""
    if values.shape[-1] == 1:
        return binary(values[..., 0])
    if values.shape[-1] == 4:
        found = separated(values[..., 3])
        if found is not None:
            return found
    if bool((values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all()):
        return binary(values[..., 0])
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return binary(unit(values[..., :3]) @ weights)


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
