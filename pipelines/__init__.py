"""Where plugins meet diffusers pipelines."""
