"""Where plugins meet diffusers."""
