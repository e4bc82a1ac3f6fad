"""Training-free techniques grafted onto diffusers pipelines: put on, used, and taken off without a trace.

Everything public is named here; a name is imported when it is first used, so that `import diffgraft` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention.call import AttentionCall as AttentionCall
    from .attention.edit import Edit as Edit
    from .attention.errors import AlreadyGraftedError as AlreadyGraftedError
    from .attention.errors import AttentionNotReachedError as AttentionNotReachedError
    from .attention.errors import BackendError as BackendError
    from .attention.errors import ConceptError as ConceptError
    from .attention.errors import GraftError as GraftError
    from .attention.errors import MaskError as MaskError
    from .attention.errors import ModelLoadError as ModelLoadError
    from .attention.errors import NonFiniteError as NonFiniteError
    from .attention.errors import SafetyCheckerError as SafetyCheckerError
    from .attention.errors import SettingError as SettingError
    from .attention.errors import SettingTypeError as SettingTypeError
    from .attention.errors import UnsupportedPipelineError as UnsupportedPipelineError
    from .attention.errors import UnsupportedSchedulerError as UnsupportedSchedulerError
    from .attention.layer import AttentionLayer as AttentionLayer
    from .attention.layer import find_layers as find_layers
    from .attention.processor import edit_processors as edit_processors
    from .attention.seam import stop_probe as stop_probe
    from .attention.step import Step as Step
    from .pipelines.families.family import Along as Along
    from .pipelines.families.family import Family as Family
    from .pipelines.families.family import Latent as Latent
    from .pipelines.families.family import Meet as Meet
    from .pipelines.families.table import declare_family as declare_family
    from .pipelines.grafting.graft import Graft as Graft
    from .pipelines.grafting.graft import graft as graft
    from .pipelines.load import load as load
    from .pipelines.picturebook import picturebook as picturebook
    from .pipelines.tasks.erase import erase as erase
    from .pipelines.tasks.generate import generate as generate
    from .pipelines.tasks.inversion import Inversion as Inversion
    from .pipelines.tasks.inversion import invert as invert
    from .pipelines.tasks.maps import AttentionMaps as AttentionMaps
    from .pipelines.tasks.maps import AttentionMasks as AttentionMasks
    from .pipelines.tasks.maps import attention_maps as attention_maps
    from .pipelines.tasks.maps import attention_masks as attention_masks
    from .pipelines.tasks.optimise import Startpoint as Startpoint
    from .pipelines.tasks.optimise import optimise_startpoint as optimise_startpoint
    from .pipelines.tasks.seeds import rank_seeds as rank_seeds
    from .pipelines.tasks.stylize import stylize as stylize
    from .plugins.base import Branch as Branch
    from .plugins.base import Plugin as Plugin
    from .plugins.concept_block import ConceptBlock as ConceptBlock
    from .plugins.distillation import AttentionDistillation as AttentionDistillation
    from .plugins.losses import LOSSES as LOSSES
    from .plugins.losses import Maps as Maps
    from .plugins.negative_away import NegativeAway as NegativeAway
    from .plugins.redirection import SelfAttentionRedirection as SelfAttentionRedirection
    from .plugins.segregation import AttentionSegregation as AttentionSegregation
    from .plugins.startpoint import StartpointFilter as StartpointFilter
    from .plugins.startpoint_losses import colour_loss as colour_loss
    from .plugins.startpoint_losses import histogram_loss as histogram_loss
    from .plugins.startpoint_losses import intensity_loss as intensity_loss
    from .plugins.style_injection import StyleInjection as StyleInjection

__version__ = "0.2.0"

_HOMES = {
    "attention.call": ("AttentionCall",),
    "attention.edit": ("Edit",),
    "attention.errors": (
        "AlreadyGraftedError", "AttentionNotReachedError", "BackendError", "ConceptError", "GraftError", "MaskError",
        "ModelLoadError", "NonFiniteError", "SafetyCheckerError", "SettingError", "SettingTypeError",
        "UnsupportedPipelineError", "UnsupportedSchedulerError",
    ),
    "attention.layer": ("AttentionLayer", "find_layers"),
    "attention.processor": ("edit_processors",),
    "attention.seam": ("stop_probe",),
    "attention.step": ("Step",),
    "pipelines.tasks.erase": ("erase",),
    "pipelines.tasks.generate": ("generate",),
    "pipelines.families.family": ("Along", "Family", "Latent", "Meet"),
    "pipelines.families.table": ("declare_family",),
    "pipelines.grafting.graft": ("Graft", "graft"),
    "pipelines.tasks.inversion": ("Inversion", "invert"),
    "pipelines.load": ("load",),
    "pipelines.tasks.maps": ("AttentionMaps", "AttentionMasks", "attention_maps", "attention_masks"),
    "pipelines.picturebook": ("picturebook",),
    "pipelines.tasks.optimise": ("Startpoint", "optimise_startpoint"),
    "pipelines.tasks.seeds": ("rank_seeds",),
    "pipelines.tasks.stylize": ("stylize",),
    "plugins.base": ("Branch", "Plugin"),
    "plugins.concept_block": ("ConceptBlock",),
    "plugins.distillation": ("AttentionDistillation",),
    "plugins.losses": ("LOSSES", "Maps"),
    "plugins.negative_away": ("NegativeAway",),
    "plugins.redirection": ("SelfAttentionRedirection",),
    "plugins.segregation": ("AttentionSegregation",),
    "plugins.startpoint": ("StartpointFilter",),
    "plugins.startpoint_losses": ("colour_loss", "histogram_loss", "intensity_loss"),
    "plugins.style_injection": ("StyleInjection",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffgraft' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
