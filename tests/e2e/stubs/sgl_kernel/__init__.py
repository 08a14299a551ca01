"""Import-only stand-in for sgl-kernel, whose CPU build is not on PyPI. SGLang imports names from it when it starts; the
plain decoding that these tests do calls none of them, and a call says which."""

from typing import Any

__version__ = "0.4.10"
__path__: list[str] = []  # a package without modules: "import sgl_kernel.x" is "not found", as SGLang expects


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} was called, but only an import stub is installed")

    return unavailable
