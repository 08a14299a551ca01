"""Config: the settings of an engine, checked when they are made."""

from __future__ import annotations

from pdxfer import _core


class Config:
    """Settings of an :class:`~pdxfer.Engine`: defaults, then ``PDXFER_*`` variables, then the keywords given here.

    Every field, its meaning, unit and default is in docs/configuration.md. Sizes are bytes and may be written as
    ``"64MiB"``.

    Raises:
        InvalidError: a field does not exist, does not parse or is out of range; the text names it.
    """

    def __init__(self, *, environment: bool = True, **fields: str | int) -> None:
        self._native = _core.Config(environment=environment)
        for name, value in fields.items():
            if not isinstance(value, (str, int)) or isinstance(value, bool):
                raise _core.InvalidError(f"Config.{name}: expected text or a whole number, not {type(value).__name__}")
            self._native.set(name, str(value))
        self._native.validate()

    def items(self) -> dict[str, str]:
        """Every field and its value as text; the secret shows as ``***``."""
        return dict(self._native.items())

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{name}={value!r}" for name, value in self.items().items()) + ")"
