"""What the machine can do for the same number of bytes: plain memcpy, or raw sockets.

A ceiling is measured between the same two processes as the transfers, a pass before each repeat, so that noise hits
both. memcpy: libc's, from the source pool into a mapping that the receiving process made and touched, contiguous
blocks, as many threads as the engine copies with. tcp: Python sockets with 1 MiB pieces, a thread per stream at each
end (sendall and recv_into release the GIL), from the source pool into a buffer per stream, acknowledged at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import ByteArray

PIECE = 1 << 20
CACHE_LINE = 64
SECONDS = 60.0  # bound of every wait on a raw stream

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p


class SharedTarget:
    """Receiving end of the memcpy ceiling: `bytes` of shared memory, touched here, that another process can map."""

    def __init__(self, bytes: int) -> None:
        self.bytes = bytes
        self.fd = os.memfd_create("pdxfer-bench-ceiling", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, bytes)
            self._map = mmap.mmap(self.fd, bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, ValueError):
            os.close(self.fd)
            raise

    def path(self) -> str:
        """Where a process of the same user opens it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


class MemcpyCeiling:
    """Sending end: times libc memcpy from `source` into another process's `SharedTarget`.

    Args:
        source: buffers of this process; their first `bytes` bytes are copied.
        path: `SharedTarget.path()` of the other process.
        threads: threads that share the copy.
    """

    def __init__(self, source: list[ByteArray], bytes: int, path: str, threads: int) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BenchError(f"cannot map the other process's memory for the memcpy ceiling: {error}") from None
        try:
            self._map = mmap.mmap(fd, bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)
        self.bytes = bytes
        self.threads = threads
        self.kind = f"libc memcpy into the peer's mapping, {threads} thread{'s' if threads > 1 else ''}"
        self._source = source
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        # The block size that memcpy likes best, so that this is a ceiling: measured once, outside the repeats.
        candidates = [self._shares(block) for block in (256 << 10, 4 << 20, max(len(s) for s in source))]
        self._copy(candidates[0])
        self._work = min(candidates, key=lambda work: min(self._copy(work) for _ in range(2)))

    def _shares(self, block: int) -> list[list[tuple[int, int, int]]]:
        """(to, from, bytes) of every memcpy, one list per thread."""
        target = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        copies, done = [], 0
        for buffer in self._source:
            begin = 0
            while begin < len(buffer) and done < self.bytes:
                size = min(block, len(buffer) - begin, self.bytes - done)
                copies.append((target + done, buffer.ctypes.data + begin, size))
                begin, done = begin + size, done + size
        each = -(-len(copies) // self.threads)
        return [copies[first : first + each] for first in range(0, len(copies), each)]

    def _copy(self, work: list[list[tuple[int, int, int]]]) -> float:
        def share(copies: list[tuple[int, int, int]]) -> None:
            for to, source, size in copies:
                _libc.memcpy(to, source, size)

        begin = time.perf_counter()
        if self._pool is None:
            for copies in work:
                share(copies)
        else:
            list(self._pool.map(share, work))
        return time.perf_counter() - begin

    def measure(self) -> float:
        """Seconds of one pass over all bytes."""
        return self._copy(self._work)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._map.close()


class StreamSink:
    """Receiving end of the tcp ceiling: a thread per stream takes what comes and acknowledges it with one byte."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=64)
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="bench-sink", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                self._open.append(sock)
            threading.Thread(target=_drain, args=(sock,), name="bench-stream", daemon=True).start()

    def close(self) -> None:
        # shutdown wakes accept() and recv(), close alone does not
        for sock in [self._listener, *self._open]:
            with contextlib.suppress(OSError):  # not connected any more
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def _drain(sock: socket.socket) -> None:
    # On a cache line: where a large malloc begins, 16 bytes past a page, the kernel's copy was a quarter slower.
    memory = np.empty(PIECE + CACHE_LINE, dtype=np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    buffer = memory[begin : begin + PIECE].data
    header = memoryview(bytearray(8))
    try:
        while _fill(sock, header):
            (left,) = struct.unpack("!Q", header)
            while left:
                got = sock.recv_into(buffer[: min(left, PIECE)])
                if not got:
                    return
                left -= got
            sock.sendall(b"\x01")
    except OSError:
        return  # the sender is gone, or close() was called


def _fill(sock: socket.socket, view: memoryview) -> bool:
    while view:
        got = sock.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True


class StreamCeiling:
    """Sending end: times `bytes` bytes of `source` over raw streams, shared evenly.

    Args:
        host, port: a `StreamSink` of the other process, over the route that the transfers take.
        streams: as many connections as the transport uses.
    """

    def __init__(self, source: list[ByteArray], bytes: int, host: str, port: int, streams: int) -> None:
        self.streams = streams
        self.kind = f"{streams} raw socket stream{'s' if streams > 1 else ''}"
        self._pieces = _pieces(source, bytes)
        self._sockets: list[socket.socket] = []
        try:
            for _ in range(streams):
                sock = socket.create_connection((host, port), timeout=SECONDS)
                self._sockets.append(sock)
                # Bounded by the kernel: Python's own timeout would put a poll() before every send.
                sock.settimeout(None)
                for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(SECONDS), 0))
        except OSError as error:
            self.close()
            raise BenchError(f"raw socket streams to {host}: {error.strerror or error}") from None
        self._pool = ThreadPoolExecutor(streams)
        self.measure()

    def measure(self, streams: int | None = None) -> float:
        """Seconds from the first byte until every stream was acknowledged. `streams`: use only that many."""
        use = self._sockets[:streams]
        shares = [self._pieces[first :: len(use)] for first in range(len(use))]
        begin = time.perf_counter()
        try:
            list(self._pool.map(_send, use, shares))
        except OSError as error:
            raise BenchError(f"raw socket stream: {error.strerror or error}") from None
        return time.perf_counter() - begin

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        if hasattr(self, "_pool"):
            self._pool.shutdown()


def _pieces(source: list[ByteArray], bytes: int) -> list[memoryview]:
    left = bytes
    pieces: list[memoryview] = []
    for buffer in source:
        for begin in range(0, len(buffer), PIECE):
            size = min(PIECE, len(buffer) - begin, left)
            if not size:
                return pieces
            pieces.append(buffer[begin : begin + size].data)
            left -= size
    return pieces


def _send(sock: socket.socket, pieces: list[memoryview]) -> None:
    sock.sendall(struct.pack("!Q", sum(len(piece) for piece in pieces)))
    for piece in pieces:
        sock.sendall(piece)
    if sock.recv(1) != b"\x01":
        raise ConnectionResetError(0, "the other end closed a raw stream")
