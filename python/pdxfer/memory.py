"""What can be registered: finding the address, size and device of a Python object's memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from pdxfer import _core

if TYPE_CHECKING:
    import numpy as np

HOST = -1
_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost


class Span(NamedTuple):
    """`bytes` bytes at `pointer`; `device` is a CUDA ordinal or HOST; `keep` must live as long as they are used."""

    pointer: int
    bytes: int
    device: int
    keep: object


def _device_of(device: object) -> int:
    text = str(device)
    if text == "cpu":
        return HOST
    if text.startswith("cuda:") and text[5:].isdigit():
        return int(text[5:])
    raise _core.InvalidError(f"device {text!r}: expected 'cpu' or 'cuda:N'")


def _of_array(array: np.ndarray[Any, Any], keep: object) -> Span:
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise _core.InvalidError(
            f"array of shape {array.shape} and strides {array.strides} is not contiguous; register the array that "
            "owns the memory"
        )
    return Span(array.ctypes.data, array.nbytes, HOST, keep)


def span_of(memory: object) -> Span:
    """The span of a torch tensor, a NumPy array, an object with DLPack, or (pointer, bytes, device).

    Raises:
        InvalidError: not such an object, or its elements do not lie back to back.
    """
    import numpy as np  # late: it costs more than all of pdxfer, and `import pdxfer` is to be quick

    if isinstance(memory, tuple):
        if len(memory) != 3 or not all(isinstance(x, (int, np.integer)) for x in memory[:2]):
            raise _core.InvalidError(f"expected (pointer, bytes, device) such as (addr, 4096, 'cpu'), not {memory!r}")
        pointer, size, device = memory
        if pointer <= 0 or size <= 0:
            raise _core.InvalidError(f"pointer {pointer} and bytes {size} must both be above 0")
        return Span(int(pointer), int(size), _device_of(device), None)
    if isinstance(memory, np.ndarray):
        return _of_array(memory, memory)
    if hasattr(memory, "data_ptr") and hasattr(memory, "is_contiguous"):  # torch, which is never imported here
        tensor: Any = memory
        if not tensor.is_contiguous():
            raise _core.InvalidError(
                f"tensor of shape {tuple(tensor.shape)} is not contiguous; register the tensor that owns it"
            )
        size = math.prod(tensor.shape) * tensor.element_size()
        return Span(tensor.data_ptr(), size, _device_of(tensor.device), tensor)
    if hasattr(memory, "__dlpack__"):
        exporter: Any = memory
        kind = exporter.__dlpack_device__()[0]
        if int(kind) not in _DLPACK_HOST:
            raise _core.UnavailableError(f"DLPack device type {int(kind)}: only host memory is supported by this path")
        array = np.from_dlpack(exporter)
        return _of_array(array, (array, memory))
    raise _core.InvalidError(
        f"cannot register {type(memory).__name__}: expected a torch tensor, a NumPy array, an object with DLPack, or "
        "(pointer, bytes, device)"
    )
