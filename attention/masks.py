"""Masks from pixels to the tokens of every layer, at any size and aspect."""

from __future__ import annotations

from .errors import UnsupportedPipelineError


def level_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the level with `tokens` tokens below a full grid of `size`.

    A UNet halves with rounding up at every level (stride 2, padding 1), so 65x97 goes 33x49, 17x25.

    Raises:
        UnsupportedPipelineError: no level has that many tokens (tokens were merged or appended).
    """
    height, width = size
    while height * width > tokens and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise UnsupportedPipelineError(
            f"a layer has {tokens} tokens, which is no level of a {size[0]}x{size[1]} latent: "
            "remove whatever merges or appends image tokens (tomesd.remove_patch(pipe)) and try again"
        )
    return height, width
