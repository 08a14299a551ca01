"""Which device a pointer of SGLang's belongs to, asked of the CUDA driver and not derived from options.

SGLang hands over bare pointers. On a GPU server most are on this rank's GPU, but metadata rows and host pools are not,
and the number of the GPU depends on CUDA_VISIBLE_DEVICES. The driver knows both: its ordinals are this process's.
Called by the manager's memory table from the scheduler thread, once per region at start-up; owns nothing but the
driver's table of functions, opened by name (a CPU server never opens it).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pdxfer

_LIBRARY = "libcuda.so.1"
_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE: not memory that CUDA knows, so pageable host memory
_MEMORY_TYPE, _DEVICE_ORDINAL = 2, 9  # CU_POINTER_ATTRIBUTE_*
_TYPE_HOST = 1  # CU_MEMORYTYPE_HOST: pinned or registered host memory


def _open_driver() -> Any:
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise pdxfer.UnavailableError(
            f"{_LIBRARY} cannot be opened ({error}), so it is unknown where SGLang's KV cache lies; "
            "`pdxfer doctor` shows what was found of CUDA"
        ) from error
    driver.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
    driver.cuPointerGetAttribute.restype = ctypes.c_int
    return driver


class PointerDevices:
    """Asks the driver. `on_gpu`: is the server one whose pools are on a GPU? Else every pointer is host memory.

    Args:
        open_driver: gives an object with `cuPointerGetAttribute`; called at the first question.
    """

    def __init__(self, on_gpu: bool, open_driver: Callable[[], Any] = _open_driver) -> None:
        self._on_gpu = on_gpu
        self._open_driver = open_driver
        self._driver: Any = None

    def __call__(self, pointer: int) -> str:
        """``"cpu"`` or ``"cuda:N"``, N being this process's ordinal.

        Raises:
            pdxfer.UnavailableError: there is no driver, or it does not answer; the text has its error code.
        """
        if not self._on_gpu:
            return "cpu"
        if self._driver is None:
            self._driver = self._open_driver()
        code, kind = self._ask(_MEMORY_TYPE, pointer, ctypes.c_uint(0))
        if code == _INVALID_VALUE or (code == 0 and kind in (0, _TYPE_HOST)):
            return "cpu"
        if code == 0:
            code, ordinal = self._ask(_DEVICE_ORDINAL, pointer, ctypes.c_int(-1))
            if code == 0 and ordinal >= 0:
                return f"cuda:{ordinal}"
        raise pdxfer.UnavailableError(
            f"cuPointerGetAttribute of {pointer:#x} failed with CUDA error {code}: it is unknown which device "
            "the memory is on; `pdxfer doctor` shows what was found of CUDA"
        )

    def _ask(self, attribute: int, pointer: int, answer: Any) -> tuple[int, int]:
        code = self._driver.cuPointerGetAttribute(ctypes.addressof(answer), attribute, pointer)
        return int(code), int(answer.value)
