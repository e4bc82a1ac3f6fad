"""Every error that diffgraft raises on purpose. Each is also the built-in error that a user would catch."""

from __future__ import annotations


class GraftError(Exception):
    """Base of all diffgraft errors. The message says what was found and what to do."""


class UnsupportedPipelineError(GraftError, TypeError):
    """The pipeline, its denoiser or something enabled on it cannot be edited."""


class UnsupportedSchedulerError(GraftError, RuntimeError):
    """The scheduler would discard what a plugin does to the latents."""


class AttentionNotReachedError(GraftError, RuntimeError):
    """A selected attention layer ran without `scaled_dot_product_attention`, so it could not be edited."""


class AlreadyGraftedError(GraftError, RuntimeError):
    """The denoiser already carries a graft in this context."""


class DetachedError(GraftError, RuntimeError):
    """The graft is not attached."""


class SettingError(GraftError, ValueError):
    """An argument has a value outside its range."""


class SettingTypeError(GraftError, TypeError):
    """An argument has the wrong type."""


class ImageError(SettingError):
    """A file, an array or an upload is not a picture that can be used."""


class ImageWarning(UserWarning):
    """A picture was used, but not quite as it was given."""


class ConceptError(GraftError, ValueError):
    """A word asked for is not in the prompt, or was cut off by the tokenizer."""


class MaskError(GraftError, ValueError):
    """A mask is empty, full, of the wrong size, or not a mask."""


class BackendError(GraftError, RuntimeError):
    """The attention backend asked for does not run here."""


class NonFiniteError(GraftError, RuntimeError):
    """NaN or infinity appeared while sampling."""


class SafetyCheckerError(GraftError, RuntimeError):
    """The pipeline's own safety checker blanked a picture."""


class ModelLoadError(GraftError, RuntimeError):
    """A model could not be loaded."""
