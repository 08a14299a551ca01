"""Names that SGLang and transformers import."""

from .. import InterpolationMode
from . import functional

__all__ = ["InterpolationMode", "functional"]
