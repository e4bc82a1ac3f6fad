"""Common words with which a blocked concept is compared: what is meant by "something else" where it stood.

A tokenizer that does not know one of them, or cuts it in pieces, passes over it.
"""

from __future__ import annotations

FUNCTION_WORDS = ("a", "and", ",", "style")
"""What stands between things; a column that is nearer to one of these does not hold the concept."""

MANNERS = ("sketch", "mosaic", "dots", "watercolor", "photo", "painting", "drawing")
"""How a picture is made: what a concept is told apart from, but never put in its place."""

NEUTRAL_WORDS = (
    "ball", "box", "star", "heart", "moon", "flower", "tree", "house", "fish", "boat", "car", "dog", "cat", "bird",
    "horse", "chair", "table", "book", "cup", "apple", "bread", "shirt", "phone", "clock", "bridge", "river",
    "mountain", "street", "garden", "room", "man", "woman", "child", "crowd", "face", "hand",
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "brown", "grey",
    "small", "large", "old", "new", "wooden", "metal", "round",
    "sky", "meadow", "sea", "desert", "night", "snow", "forest", "city", "beach", "rain",
    *MANNERS,
)  # fmt: skip
