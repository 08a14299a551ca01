"""``--disaggregation-ib-device``: one name, a comma list, a JSON map of GPU to names, or a file that holds such a map.

Pure but for reading the file and listing /sys/class/infiniband. Called when a manager is built, so that a typing error
stops the server with a text that says what to write instead of surfacing as a slow or missing path.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

SYSFS = Path("/sys/class/infiniband")
_FORMS = (
    'write mlx5_0, or mlx5_0,mlx5_1, or {"0": "mlx5_0", "1": "mlx5_1,mlx5_2"}, or the path of a file with such JSON'
)


class IbDeviceError(ValueError):
    """``--disaggregation-ib-device`` is not usable; the text says what was given and what would be right."""

    def __init__(self, value: str, why: str) -> None:
        super().__init__(f"--disaggregation-ib-device {value!r}: {why}")


def devices_present(sysfs: Path = SYSFS) -> list[str]:
    """RDMA devices of this machine, sorted; none when there is no RDMA driver."""
    return sorted(entry.name for entry in sysfs.iterdir()) if sysfs.is_dir() else []


def _names(value: str, text: object, where: str) -> list[str]:
    if not isinstance(text, str):
        raise IbDeviceError(value, f"{where} must be text with device names, not {type(text).__name__}; {_FORMS}")
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise IbDeviceError(value, f"{where} has an empty name; {_FORMS}")
    for name in names:
        if any(c.isspace() or c in '/{}"' for c in name):
            raise IbDeviceError(value, f"{where}: {name!r} is not a device name; {_FORMS}")
    return list(dict.fromkeys(names))


def _mapping(value: str, text: str, source: str) -> dict[str, list[str]]:
    try:
        mapping = json.loads(text)
    except ValueError as error:
        raise IbDeviceError(value, f"{source} is not JSON ({error}); {_FORMS}") from None
    if not isinstance(mapping, dict) or not mapping:
        raise IbDeviceError(
            value, f"{source} must be a JSON object of GPU to devices with at least one entry; {_FORMS}"
        )
    for gpu in mapping:
        if not gpu.strip().isdigit():
            raise IbDeviceError(value, f'{source} has the key {gpu!r}: keys are GPU numbers such as "0"; {_FORMS}')
    return {str(int(gpu)): _names(value, names, f"{source}, GPU {gpu}") for gpu, names in mapping.items()}


def parse(value: str) -> dict[str, list[str]]:
    """Device names by GPU number; the key ``"*"`` means every GPU.

    Raises:
        IbDeviceError: not one of the documented forms.
    """
    text = value.strip()
    if not text:
        raise IbDeviceError(value, f"nothing given; {_FORMS}")
    if text.startswith("{"):
        return _mapping(value, text, "the map")
    if os.path.sep in text or text.endswith(".json"):
        path = Path(text)
        if not path.is_file():
            raise IbDeviceError(value, f"there is no file {text}; {_FORMS}")
        return _mapping(value, path.read_text(), f"the file {text}")
    return {"*": _names(value, text, "the list")}


def rdma_options(existing: str, names: list[str], gpu: int | None) -> tuple[str, str]:
    """The engine's setting ``rdma`` for one rank, and a note for the log.

    Args:
        existing: the user's setting (``PDXFER_RDMA``), whose other options are kept.
        names: what `select` returned; the command line's devices replace the setting's.
        gpu: the rank's CUDA ordinal; None: its KV cache is in host memory.

    Returns:
        (setting, note). An empty note: nothing to say.
    """
    options = dict(item.partition("=")[::2] for item in existing.split(",") if item)
    note = ""
    if names:
        wanted = ";".join(names)
        if options.get("devices", wanted) != wanted:
            note = f"--disaggregation-ib-device takes the place of devices={options['devices']} in PDXFER_RDMA"
        options["devices"] = wanted
    if gpu is not None:
        options.setdefault("gpu", str(gpu))
    return ",".join(f"{name}={value}" for name, value in options.items()), note


def select(value: str | None, gpu: int, present: list[str] | None = None) -> tuple[list[str], str]:
    """The devices for one GPU, and a note for the log.

    Args:
        value: the option as typed, or None when it was not given.
        gpu: the rank's GPU number as the process sees it.
        present: devices of this machine; by default those of /sys/class/infiniband.

    Returns:
        (names, note). No names: choose automatically. An empty note: nothing to say.

    Raises:
        IbDeviceError: not one of the documented forms, a device that this machine does not have, or no entry for `gpu`.
    """
    if value is None:
        return [], ""
    by_gpu = parse(value)
    have = devices_present() if present is None else present
    if not have:
        return [], (
            f"--disaggregation-ib-device {value!r} has no effect: this machine has no RDMA device "
            "(/sys/class/infiniband is missing or empty); KV cache goes through shared memory or TCP"
        )
    unknown = sorted({name for names in by_gpu.values() for name in names} - set(have))
    if unknown:
        raise IbDeviceError(value, f"no such device: {', '.join(unknown)}; this machine has {', '.join(have)}")
    names = by_gpu.get("*") or by_gpu.get(str(gpu))
    if names is None:
        raise IbDeviceError(value, f"no entry for GPU {gpu}; the map has {', '.join(sorted(by_gpu))}")
    return names, ""
