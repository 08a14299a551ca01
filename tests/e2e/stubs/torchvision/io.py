"""Names that SGLang imports."""

import enum


class ImageReadMode(enum.Enum):
    UNCHANGED = 0
    GRAY = 1
    RGB = 3


def decode_image(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("torchvision is an import stub here")


decode_jpeg = decode_image
