"""The Python API: engines in one process and in two, every transport, every typed error."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import numpy as np
import pytest

import pdxfer

TRANSPORTS = ["shm", "tcp"] if "RDMA_BED" not in os.environ else ["rdma"]  # tests/rdma/run
SHM_PATHS = ["map", "cma", "staging"]


def make(**fields: str | int) -> pdxfer.Engine:
    return pdxfer.Engine(pdxfer.Config(environment=False, peer_timeout_ms=1000, log_level="error", **fields))


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[pdxfer.Engine, pdxfer.Engine]]:
    with make(transports=request.param) as a, make(transports=request.param) as b:
        yield a, b


def pages(rng: np.random.Generator, slots: int, count: int) -> np.ndarray:
    return rng.permutation(slots)[:count].astype(np.int32)


def allocate(shape: tuple[int, int], fill: int) -> np.ndarray:
    """Pages in a private mapping of their own, as large pools have; small arrays would lie on the heap."""
    size = shape[0] * shape[1]
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(mapping, dtype=np.uint8, count=size).reshape(shape)
    array[:] = fill
    return array


def layout(regions: list[pdxfer.Region], page_bytes: int, slots: int) -> pdxfer.KvLayout:
    return pdxfer.KvLayout(buffers=[(region, 0) for region in regions], page_bytes=page_bytes, slots=slots)


def move(a: pdxfer.Engine, b: pdxfer.Engine, page_bytes: int, count: int, *, layers: int = 3, seed: int = 0) -> None:
    """One random transfer, verified byte for byte, with everything outside the target pages unchanged."""
    rng = np.random.default_rng(seed)
    slots = count * 3 + 5
    targets = [allocate((slots, page_bytes), 0xAA) for _ in range(layers)]
    sources = [allocate((slots, page_bytes), 0) for _ in range(layers)]
    for array in sources:
        array[:] = rng.integers(0, 255, array.shape, dtype=np.uint8)
    src_regions = [a.register_memory(array) for array in sources]
    dst_regions = [b.register_memory(array) for array in targets]
    peer = a.connect(b.address)
    there = [peer.find_region(region.pointer, region.bytes)[0] for region in dst_regions]
    src_pages, dst_pages = pages(rng, slots, count), pages(rng, slots, count)
    plan = pdxfer.make_plan(
        layout(src_regions, page_bytes, slots), layout(there, page_bytes, slots), src_pages, dst_pages
    )
    assert plan.bytes == count * page_bytes * layers
    a.transfer(peer, plan, tag=seed, tail=b"row")
    expected = [np.full((slots, page_bytes), 0xAA, dtype=np.uint8) for _ in range(layers)]
    for source, want, got in zip(sources, expected, targets, strict=True):
        want[dst_pages] = source[src_pages]
        assert np.array_equal(want, got)
    arrived = []
    deadline = time.monotonic() + 5
    while not arrived and time.monotonic() < deadline:
        arrived = b.poll()
    assert [(x.tag, x.tail, x.ok) for x in arrived] == [(seed, b"row", True)]
    for engine, regions in ((a, src_regions), (b, dst_regions)):
        for region in regions:
            engine.deregister_memory(region)
    a.disconnect(peer)


@pytest.mark.parametrize(("page_bytes", "count"), [(1, 7), (256, 100), (1000, 33), (1152, 64), (4096, 50), (65536, 20)])
def test_pages_arrive(pair: tuple[pdxfer.Engine, pdxfer.Engine], page_bytes: int, count: int) -> None:
    move(*pair, page_bytes, count, seed=page_bytes)


@pytest.mark.parametrize("path", SHM_PATHS)
def test_every_way_of_shared_memory(path: str) -> None:
    with make(transports="shm", shm_path=path) as a, make(transports="shm", shm_path=path) as b:
        for seed in range(5):
            move(a, b, 1024 + seed, 200, seed=seed)


def test_ipv6() -> None:
    with make(transports="tcp", host="::1") as a, make(transports="tcp", host="::1") as b:
        assert b.address.startswith("[::1]:")
        move(a, b, 512, 40)


def test_both_directions_at_once(pair: tuple[pdxfer.Engine, pdxfer.Engine]) -> None:
    a, b = pair
    arrays = [np.full((256, 4096), fill, dtype=np.uint8) for fill in (1, 2, 3, 4)]
    regions = [e.register_memory(x) for e, x in zip((a, a, b, b), arrays, strict=True)]
    to_b, to_a = a.connect(b.address), b.connect(a.address)
    ids = np.arange(256, dtype=np.int32)
    one = pdxfer.make_plan(layout([regions[0]], 4096, 256), layout([regions[3]], 4096, 256), ids, ids)
    two = pdxfer.make_plan(layout([regions[2]], 4096, 256), layout([regions[1]], 4096, 256), ids, ids)
    batches = [e.submit(p, plan) for _ in range(20) for e, p, plan in ((a, to_b, one), (b, to_a, two))]
    for batch in batches:
        batch.wait(20)
    assert (arrays[3] == 1).all() and (arrays[1] == 3).all()


def test_bad_pages_are_named_and_nothing_moves(pair: tuple[pdxfer.Engine, pdxfer.Engine]) -> None:
    a, b = pair
    source, target = np.ones((16, 64), np.uint8), np.zeros((16, 64), np.uint8)
    src, dst = a.register_memory(source), b.register_memory(target)
    peer = a.connect(b.address)

    def plan_of(src_pages: list[int], dst_pages: list[int]) -> pdxfer.TransferPlan:
        one, two = layout([src], 64, 16), layout([dst], 64, 16)
        return pdxfer.make_plan(one, two, np.array(src_pages, np.int32), np.array(dst_pages, np.int32))

    for bad in ([-1], [16], [2**31 - 1]):
        with pytest.raises(pdxfer.InvalidError, match=str(bad[0])):
            plan_of(bad, [0])
        with pytest.raises(pdxfer.InvalidError, match=str(bad[0])):
            plan_of([0], bad)
    with pytest.raises(pdxfer.InvalidError):
        plan_of([1, 2], [1])
    lying = pdxfer.KvLayout(buffers=[(src, 0)], page_bytes=64, slots=1000)
    plan = pdxfer.make_plan(lying, layout([dst], 64, 16), np.array([900], np.int32), np.array([0], np.int32))
    with pytest.raises(pdxfer.InvalidError, match="source slot outside"):
        a.submit(peer, plan)
    for nobody in ("peer", None, 1.5):
        with pytest.raises(TypeError, match="a Peer or its id"):
            a.submit(nobody, plan)  # type: ignore[arg-type]
    with pytest.raises(pdxfer.InvalidError, match="peer 99 is not known"):
        a.submit(99, plan)
    assert not target.any()


def test_memory_kinds() -> None:
    with make(transports="tcp") as engine:
        array = np.zeros(4096, np.uint8)
        region = engine.register_memory((array.ctypes.data, 2048, "cpu"))
        assert (region.pointer, region.bytes, region.device) == (array.ctypes.data, 2048, -1)
        with pytest.raises(pdxfer.InvalidError, match="overlaps"):
            engine.register_memory(array)
        found, offset = engine.find_region(array.ctypes.data + 100, 10)
        assert (found.id, offset) == (region.id, 100)
        with pytest.raises(pdxfer.InvalidError, match="not contiguous"):
            engine.register_memory(np.zeros((8, 8))[:, ::2])
        with pytest.raises(pdxfer.InvalidError, match="cannot register"):
            engine.register_memory("text")
        with pytest.raises(pdxfer.InvalidError, match="device"):
            engine.register_memory((1, 1, "tpu:0"))
        with pytest.raises(pdxfer.UnavailableError):
            engine.register_memory((array.ctypes.data + 2048, 64, "cuda:0"))
        with pytest.raises(pdxfer.InvalidError):
            engine.deregister_memory(12345)


def test_registered_memory_is_kept_alive() -> None:
    with make(transports="tcp") as engine:
        region = engine.register_memory(np.full(1 << 20, 7, np.uint8))
        import ctypes
        import gc

        gc.collect()
        assert ctypes.string_at(region.pointer, 16) == b"\x07" * 16


def test_config_errors_name_the_field() -> None:
    for field, value in [
        ("tcp_streams", "x"),
        ("port", 70000),
        ("shm_path", "warp"),
        ("chunk_bytes", "1TB"),
        ("nope", 1),
    ]:
        with pytest.raises(pdxfer.InvalidError, match=field):
            pdxfer.Config(environment=False, **{field: value})
    with pytest.raises(pdxfer.InvalidError, match="carrier"):
        make(transports="shm,carrier")
    os.environ["PDXFER_TCP_STREAMS"] = "many"
    try:
        with pytest.raises(pdxfer.InvalidError, match="PDXFER_TCP_STREAMS"):
            pdxfer.Config()
    finally:
        del os.environ["PDXFER_TCP_STREAMS"]
    assert "hunter2" not in repr(pdxfer.Config(environment=False, secret="hunter2"))


def test_connect_errors() -> None:
    with make(transports="tcp", secret="one") as a, make(transports="tcp", secret="two") as b:
        with pytest.raises(pdxfer.UnavailableError, match="secret"):
            a.connect(b.address)
        with pytest.raises(pdxfer.InvalidError):
            a.connect("no port here")
        with pytest.raises(pdxfer.UnavailableError, match="127.0.0.1:1"):
            a.connect("127.0.0.1:1")
        with pytest.raises(pdxfer.UnavailableError, match="use"):
            make(transports="tcp", port=int(a.address.rsplit(":", 1)[1]))
    with (
        make(transports="tcp") as a,
        make(transports="shm") as b,
        pytest.raises(pdxfer.UnavailableError, match="no transport"),
    ):
        a.connect(b.address)


def test_explain_says_why_not_the_better_path() -> None:
    with make(transports="shm,tcp", fault="refuse=shm") as a, make(transports="shm,tcp") as b:
        peer = a.connect(b.address)
        why = a.explain(peer)
        assert why["transport"] == "tcp" and "shm" in why["passed_over"]
        assert a.stats()["peers"][peer.id]["alive"]


def test_a_closed_engine_says_so() -> None:
    engine = make(transports="tcp")
    engine.close()
    engine.close()
    with pytest.raises(pdxfer.UnavailableError, match="closed"):
        engine.register_memory(np.zeros(64, np.uint8))


CHILD = textwrap.dedent(
    """
    import sys, time
    import numpy as np
    import pdxfer
    config = pdxfer.Config(environment=False, transports=sys.argv[1], peer_timeout_ms=1000, log_level="error")
    engine = pdxfer.Engine(config)
    pool = np.zeros((4096, 4096), np.uint8)
    region = engine.register_memory(pool)
    print(engine.address, region.pointer, flush=True)
    time.sleep(60)
    """
)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_peer_is_a_typed_error_in_time(transport: str, kill: signal.Signals) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, transport], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        address, pointer = child.stdout.readline().split()
        with make(transports=transport, chunk_bytes=65536, fault="throttle=2MB/s") as engine:
            source = np.ones((4096, 4096), np.uint8)
            src = engine.register_memory(source)
            peer = engine.connect(address)
            dst, _ = peer.find_region(int(pointer), source.nbytes)
            ids = np.arange(4096, dtype=np.int32)
            plan = pdxfer.make_plan(layout([src], 4096, 4096), layout([dst], 4096, 4096), ids, ids)
            batch = engine.submit(peer, plan)
            time.sleep(0.2)
            assert not batch.poll()
            start = time.monotonic()
            child.send_signal(kill)
            while not batch.poll():  # not wait(): whoever that wakes comes too late to catch a peer still alive
                assert time.monotonic() - start < (1.0 if kill == signal.SIGKILL else 3.0)
            assert not peer.alive and peer.lost_reason
            with pytest.raises(pdxfer.PeerLostError):
                batch.wait(0)
            with pytest.raises(pdxfer.PeerLostError):
                engine.submit(peer, plan)
    finally:
        child.kill()
        child.wait()


def test_after_fork_the_child_is_told() -> None:
    with make(transports="tcp") as engine:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                engine.register_memory(np.zeros(64, np.uint8))
            except pdxfer.UnavailableError:
                code = 0
            signal.alarm(10)  # the engine's end must not wait for threads that are not here
            engine.close()
            vars(engine).clear()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
