"""Import-only stand-in for torchvision, which has no CPU wheel for this torch. Text models never call into it."""

from . import io, transforms

__version__ = "0.28.0"
__all__ = ["io", "transforms"]
