"""The CUDA driver as the bench needs it, by ctypes: memory, copies, IPC handles. No torch, no CuPy.

`Cuda` is one GPU as one process uses it; the calling thread gets the GPU's primary context, the one that pdxfer, torch
and the CUDA runtime use too. Waits are the driver's. Used by both ends' main threads; a thread that wants it as well
calls `attach` first.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from pdxfer.bench.errors import BenchError

ByteArray = npt.NDArray[np.uint8]
_u64, _size = ctypes.c_uint64, ctypes.c_size_t
_LAZY_PEER_ACCESS = 1
_NON_BLOCKING = 1
_HANDLE_BYTES = 64


class _IpcHandle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_byte * _HANDLE_BYTES)]


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes: how the copies of a batch may read their sources."""

    _fields_ = [
        ("source_order", ctypes.c_int),
        ("source_type", ctypes.c_int),
        ("source_id", ctypes.c_int),
        ("target_type", ctypes.c_int),
        ("target_id", ctypes.c_int),
        ("flags", ctypes.c_uint),
    ]


_STREAM_ORDER, _OVERLAP_WITH_KERNELS = 1, 1


class Cuda:
    """GPU `ordinal` of this process.

    Raises:
        BenchError: no driver, no such GPU; the text names the driver's error.
    """

    def __init__(self, ordinal: int) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BenchError(f"--memory device: no CUDA driver on this machine: {error}") from None
        self.ordinal = ordinal
        self._call("cuInit", 0)
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= ordinal < count.value:
            raise BenchError(f"--device {ordinal}: this process sees {count.value} GPUs")
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(self._device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.attach()
        self._stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._driver, name)(*arguments))
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._driver.cuGetErrorName(code, ctypes.byref(text))
        error = text.value.decode() if text.value else f"error {code}"
        raise BenchError(f"{name} on GPU {self.ordinal}: {error}")

    def attach(self) -> None:
        """Make the GPU's context current to this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def name(self) -> str:
        text = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    def driver_version(self) -> str:
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU, as all of its processes leave it."""
        free, total = _size(), _size()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, count: int) -> DeviceBuffer:
        """An allocation of its own, as cudaMalloc makes it. Freed with the object."""
        pointer = _u64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), _size(count))
        return DeviceBuffer(self, pointer.value, count)

    def free(self, pointer: int) -> None:
        self._call("cuMemFree_v2", _u64(pointer))

    def fill(self, pointer: int, value: int, count: int) -> None:
        self._call("cuMemsetD8_v2", _u64(pointer), ctypes.c_ubyte(value), _size(count))
        self._call("cuCtxSynchronize")

    def upload(self, pointer: int, source: ByteArray) -> None:
        """Copy a contiguous array to the GPU; back when it is there."""
        self._call("cuMemcpyHtoD_v2", _u64(pointer), ctypes.c_void_p(source.ctypes.data), _size(source.nbytes))
        self._call("cuCtxSynchronize")

    def download(self, target: ByteArray, pointer: int) -> None:
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(target.ctypes.data), _u64(pointer), _size(target.nbytes))

    def pinned(self, count: int) -> ByteArray:
        """Page-locked host memory. It stays until the process ends: a ceiling wants one buffer for all its passes."""
        pointer = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(pointer), _size(count), 0)
        assert pointer.value is not None
        return np.ctypeslib.as_array((ctypes.c_ubyte * count).from_address(pointer.value))

    def copy_seconds(self, target: int, source: int, count: int) -> float:
        """Seconds of one copy between any two addresses that this GPU reaches, host call to completion."""
        begin = time.perf_counter()
        self._call("cuMemcpyAsync", _u64(target), _u64(source), _size(count), self._stream)
        self._call("cuStreamSynchronize", self._stream)
        return time.perf_counter() - begin

    def share(self, pointer: int) -> str:
        """An IPC handle of the allocation that begins at `pointer`, as text."""
        handle = _IpcHandle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), _u64(pointer))
        return bytes(handle).hex()

    def open(self, handle: str) -> int:
        """The address, in this process, of another process's allocation."""
        raw, pointer = _IpcHandle.from_buffer_copy(bytes.fromhex(handle)), _u64()
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), raw, _LAZY_PEER_ACCESS)
        return pointer.value

    def close_shared(self, pointer: int) -> None:
        self._call("cuIpcCloseMemHandle", _u64(pointer))

    def copy_batch(self, targets: npt.NDArray[np.uint64], sources: npt.NDArray[np.uint64], sizes: Any) -> None:
        """One cuMemcpyBatchAsync of all pieces (uint64 arrays), waited for."""
        if not hasattr(self._driver, "cuMemcpyBatchAsync_v2"):
            raise BenchError("the CUDA driver has no cuMemcpyBatchAsync_v2: it is older than 13.0")
        count = len(targets)
        attributes = _CopyAttributes(source_order=_STREAM_ORDER, flags=_OVERLAP_WITH_KERNELS)
        first = (ctypes.c_size_t * 1)(0)
        columns = [ctypes.c_void_p(column.ctypes.data) for column in (targets, sources, sizes)]
        self._call(
            "cuMemcpyBatchAsync_v2",
            *columns,
            _size(count),
            ctypes.byref(attributes),
            first,
            _size(1),
            self._stream,
        )
        self._call("cuStreamSynchronize", self._stream)


class DeviceBuffer:
    """`nbytes` bytes of a GPU at `pointer`. torch and CuPy take it as an array of bytes, without a copy."""

    def __init__(self, cuda: Cuda, pointer: int, nbytes: int) -> None:
        self.cuda = cuda
        self.pointer = pointer
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.pointer, False), "version": 3, "stream": None}

    def __del__(self) -> None:
        # At interpreter exit the driver may have gone first, and with it the memory.
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            try:
                self.cuda.free(pointer)
            except BenchError as error:
                if "DEINITIALIZED" not in str(error):
                    raise
