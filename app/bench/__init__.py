"""The picture-book world, its truth, and the numbers measured on it."""
