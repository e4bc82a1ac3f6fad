"""What a person asks for: pictures, an erased object, a style, an inversion, maps."""
