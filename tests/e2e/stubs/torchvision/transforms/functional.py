"""Names that SGLang and transformers import."""

from . import InterpolationMode

__all__ = ["InterpolationMode", "pil_to_tensor"]


def pil_to_tensor(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("torchvision is an import stub here")
