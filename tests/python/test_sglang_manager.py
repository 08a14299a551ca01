"""The manager between two engines in this process: what arrives, what fails and how, and what is reported of it."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import fake_sglang
import numpy as np
import pytest
from fake_sglang import Chunk, KVPoll, Rank, TransferInfo

import pdxfer


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


class Pair:
    """A prefill and a decode manager, registered with each other."""

    def __init__(self, manager: Any, prefill: Rank, decode: Rank) -> None:
        self.p, self.d = prefill, decode
        args = types.SimpleNamespace(device="cpu")
        self.prefill = manager(prefill.args, fake_sglang.DisaggregationMode.PREFILL, args)
        self.decode = manager(decode.args, fake_sglang.DisaggregationMode.DECODE, args)
        self.session = self.decode.get_session_id()
        self.prefill.decode_kv_args_table[self.session] = decode.registration()

    def open(self, room: int, dst_pages: list[int], aux: int = 3) -> None:
        self.prefill.request_status[room] = KVPoll.WaitingForInput
        info = TransferInfo(room, self.session, np.array(dst_pages, np.int32), aux)
        self.prefill.transfer_infos[room] = {self.session: info}

    def send(self, room: int, src_pages: list[int], start: int, last: bool, aux: int = 1, **events: Any) -> None:
        pages = np.array(src_pages, np.int32)
        chunk = Chunk(room, pages, slice(start, start + len(pages)), last, aux if last else None, **events)
        self.prefill.transfer_queues[0].put(chunk)

    def concluded(self, room: int) -> tuple[int, str | None]:
        until(lambda: any(entry[0] == room for entry in self.prefill.statuses))
        return next(entry[1:] for entry in self.prefill.statuses if entry[0] == room)

    def close(self) -> None:
        self.prefill.teardown()
        self.decode.teardown()


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    monkeypatch.setenv("PDXFER_TRANSPORTS", "rdma" if "RDMA_BED" in os.environ else "loopback")  # tests/rdma/run
    fake_sglang.install(monkeypatch)
    from pdxfer.sglang.manager import PdxKVManager

    return PdxKVManager


@pytest.fixture
def pair(manager: type[Any]) -> Iterator[Pair]:
    made = Pair(manager, filled(Rank()), Rank())
    yield made
    made.close()


def filled(rank: Rank) -> Rank:
    source = np.random.default_rng(5)
    for array in (*rank.kv, *rank.aux):
        array[:] = source.integers(1, 255, array.shape, np.uint8)
    return rank


def test_chunks_and_the_metadata_row_arrive(pair: Pair) -> None:
    pair.open(9, [7, 2, 30])
    pair.send(9, [4, 5], 0, last=False)
    pair.send(9, [11], 2, last=True)
    assert pair.concluded(9) == (KVPoll.Success, None)
    for mine, theirs in zip(pair.p.kv, pair.d.kv, strict=True):
        want = np.zeros_like(theirs)
        want[[7, 2, 30]] = mine[[4, 5, 11]]
        assert np.array_equal(theirs, want)
    for mine, theirs in zip(pair.p.aux, pair.d.aux, strict=True):
        want = np.zeros_like(theirs)
        want[3] = mine[1]
        assert np.array_equal(theirs, want)


def test_a_last_chunk_without_pages_sends_the_metadata_row(pair: Pair) -> None:
    pair.open(9, [])
    pair.send(9, [], 0, last=True)
    assert pair.concluded(9)[0] == KVPoll.Success
    assert np.array_equal(pair.d.aux[0][3], pair.p.aux[0][1])
    assert not any(array.any() for array in pair.d.kv)


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 2), (2, 1), (4, 2)])
def test_unequal_tensor_parallelism(manager: type[Any], src_tp: int, dst_tp: int) -> None:
    ratio = max(1, src_tp // dst_tp)
    for dst_rank in range(dst_tp):
        d = Rank(tp=dst_tp, rank=dst_rank)
        want = np.zeros((32, 4, 4 // dst_tp, 16), np.uint8)
        for src_rank in [dst_rank * ratio + i for i in range(ratio)] if src_tp > dst_tp else [0]:
            pair = Pair(manager, filled(Rank(tp=src_tp, rank=src_rank)), d)
            pair.open(1, [6])
            pair.send(1, [3], 0, last=True)
            assert pair.concluded(1)[0] == KVPoll.Success
            have = pair.p.kv[0].reshape(32, 4, 4 // src_tp, 16)
            if src_tp < dst_tp:
                want[6] = have[3][:, dst_rank * (4 // dst_tp) : (dst_rank + 1) * (4 // dst_tp)]
            else:
                first = (src_rank - dst_rank * ratio) * (4 // src_tp)
                want[6][:, first : first + 4 // src_tp] = have[3]
            pair.close()
        assert np.array_equal(d.kv[0].reshape(want.shape), want)


def test_a_page_outside_fails_its_room_only(pair: Pair) -> None:
    pair.open(1, [5])
    pair.send(1, [32], 0, last=True)
    status, reason = pair.concluded(1)
    assert status == KVPoll.Failed and "InvalidError" in str(reason)
    assert pair.session not in pair.prefill.failed_sessions, "the decode side did nothing wrong"
    pair.open(2, [5])
    pair.send(2, [31], 0, last=True)
    assert pair.concluded(2)[0] == KVPoll.Success
    assert pair.prefill._staging_outstanding.get(1, 0) == 0 and 1 not in pair.prefill.transfer_infos


def test_an_exception_of_sglangs_own_fails_its_room_only(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> int:
        raise RuntimeError("layouts differ")

    with monkeypatch.context() as patched:
        patched.setattr(pair.prefill, "send_aux", broken)
        pair.open(1, [5])
        pair.send(1, [4], 0, last=True)
        assert pair.concluded(1) == (KVPoll.Failed, "Failed to send KV cache: RuntimeError: layouts differ")
    assert 1 not in pair.prefill.poisoned, "nothing of the room was in flight"
    pair.open(2, [5])
    pair.send(2, [4], 0, last=True)
    assert pair.concluded(2)[0] == KVPoll.Success


def test_a_dead_decode_engine_fails_its_rooms_and_a_new_one_works(pair: Pair, manager: type[Any]) -> None:
    pair.open(1, [5])
    pair.send(1, [4], 0, last=True)
    assert pair.concluded(1)[0] == KVPoll.Success
    pair.open(2, [6])  # waiting for its forward pass
    pair.decode.teardown()
    status, reason = pair.concluded(2)
    assert status == KVPoll.Failed and "PeerLostError" in str(reason)
    assert pair.session in pair.prefill.failed_sessions
    again = manager(pair.d.args, fake_sglang.DisaggregationMode.DECODE, types.SimpleNamespace(device="cpu"))
    pair.decode, pair.session = again, again.get_session_id()
    pair.prefill.decode_kv_args_table[pair.session] = pair.d.registration()
    pair.open(3, [6])
    pair.send(3, [4], 0, last=True)
    assert pair.concluded(3)[0] == KVPoll.Success


class Socket:
    closed = False

    def close(self, linger: int | None = None) -> None:
        self.closed = True


def test_control_sockets_to_a_dead_decode_rank_are_closed_and_others_kept(
    pair: Pair, manager: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdxfer.sglang import control_sockets

    monkeypatch.setattr(control_sockets, "CLOSE_AFTER_S", 0.0)
    p = pair.prefill
    sockets = {port: (Socket(), Socket()) for port in (40001, 40002)}
    for port, (socket, monitor) in sockets.items():
        p._socket_cache[f"tcp://[::1]:{port}"], p._monitor_cache[f"tcp://[::1]:{port}"] = socket, monitor
        p._socket_send_locks[f"tcp://[::1]:{port}"] = threading.Lock()
    p.decode_kv_args_table[pair.session].endpoint = "::1"
    second = manager(Rank(rank=1).args, fake_sglang.DisaggregationMode.DECODE, types.SimpleNamespace(device="cpu"))
    try:
        other = dataclasses.replace(pair.d.registration(), endpoint="::1", dst_port=40002)
        p.decode_kv_args_table[second.get_session_id()] = other
        until(lambda: len(p._links._peers) == 2)
        pair.decode.teardown()
        until(lambda: not p._socket_cache.keys() & {"tcp://[::1]:40001"})
        until(lambda: all(socket.closed for socket in sockets[40001]))
        assert p._monitor_cache.keys() == p._socket_send_locks.keys() == {"tcp://[::1]:40002"}
        assert not any(socket.closed for socket in sockets[40002])
    finally:
        second.teardown()


def test_a_dead_prefill_engine_is_noticed_and_named(pair: Pair) -> None:
    infos = [{"rank_ip": "127.0.0.1", "rank_port": pair.p.args.rank_port}]
    pair.decode.note_prefill_ranks("10.0.0.9:8998", infos)
    pair.decode.request_status[5] = KVPoll.WaitingForInput
    until(lambda: pair.decode._prefill_ranks._alive)
    pair.prefill.teardown()
    until(lambda: pair.decode.lost_servers, 5.0)
    assert pair.decode.lost_servers == ["10.0.0.9:8998"]
    until(lambda: pair.decode.request_status[5] == KVPoll.Failed)
    assert pair.decode.failure_records[5].startswith("PeerLostError: prefill server 10.0.0.9:8998 is gone")


def test_the_control_socket_that_tells_a_dead_prefill_rank_of_an_abort_is_closed_and_others_kept(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdxfer.sglang import control_sockets

    monkeypatch.setattr(control_sockets, "CLOSE_AFTER_S", 0.2)
    dead, other = f"tcp://127.0.0.1:{pair.p.args.rank_port}", "tcp://127.0.0.1:40009"
    cache = {dead: Socket(), other: Socket()}
    monkeypatch.setattr(fake_sglang.MooncakeKVReceiver, "_socket_cache", dict(cache))
    until(lambda: pair.decode._prefill_ranks._alive)
    pair.prefill.teardown()
    until(lambda: cache[dead].closed, 5.0)
    assert fake_sglang.MooncakeKVReceiver._socket_cache == {other: cache[other]} and not cache[other].closed


def test_a_control_socket_of_a_prefill_rank_that_came_back_where_it_was_is_kept(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdxfer.sglang import control_sockets

    monkeypatch.setattr(control_sockets, "CLOSE_AFTER_S", 0.0)
    port = pair.p.args.rank_port
    socket = Socket()
    monkeypatch.setattr(fake_sglang.MooncakeKVReceiver, "_socket_cache", {f"tcp://127.0.0.1:{port}": socket})
    pair.decode.connection_pool["10.0.0.9:8998_0_0_0"] = [{"rank_ip": "127.0.0.1", "rank_port": port}]
    closing = pair.decode._control_sockets
    looked: list[bool] = []
    close_due = closing.close_due
    monkeypatch.setattr(closing, "close_due", lambda in_use: (looked.append(bool(closing._due)), close_due(in_use)))
    until(lambda: pair.decode._prefill_ranks._alive)
    pair.prefill.teardown()
    until(lambda: True in looked and not closing._due, 5.0)
    assert not socket.closed


class Stuck:
    """A batch that does not end until it is cancelled."""

    def __init__(self, stops: bool) -> None:
        self.stops, self.cancelled = stops, False

    def poll(self) -> bool:
        return self.cancelled and self.stops

    def wait(self, timeout: float) -> None:
        if not self.poll():
            time.sleep(min(timeout, 0.05))
            raise pdxfer.TransferTimeout("still in flight")
        raise pdxfer.CancelledError("cancelled")


class StuckEngine:
    """An engine whose submit gives a stuck batch; everything else is the real one's."""

    def __init__(self, engine: Any, batch: Stuck) -> None:
        self._engine, self._batch = engine, batch

    def submit(self, *args: Any, **kwargs: Any) -> Stuck:
        return self._batch

    def cancel(self, batch: Stuck) -> None:
        batch.cancelled = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize("stops", [True, False])
def test_an_abort_cancels_and_acknowledges_after_the_drain(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    from pdxfer.sglang import data_path

    monkeypatch.setattr(data_path, "SETTLE_S", 0.2)
    pair.open(1, [5])
    pair.send(1, [4], 0, last=True)
    assert pair.concluded(1)[0] == KVPoll.Success
    batch = Stuck(stops)
    engine = pair.prefill._pdx
    pair.prefill._pdx = StuckEngine(engine, batch)
    pair.open(2, [6])
    pair.send(2, [4], 0, last=True)
    until(lambda: pair.prefill._staging_outstanding.get(2, 0) == 1)
    pair.prefill.ack_targets.add(2)
    pair.prefill._maybe_ack_drained_abort(2)
    assert pair.prefill.acked == [], "acknowledged while the transfer was in flight"
    pair.prefill.update_status(2, KVPoll.Failed)
    until(lambda: batch.cancelled)
    assert pair.concluded(2)[0] == KVPoll.Failed
    if stops:
        until(lambda: pair.prefill.acked == [2])
        assert pair.prefill.poisoned == set() and 2 not in pair.prefill._staging_outstanding
    else:
        time.sleep(0.2)
        assert pair.prefill.acked == [] and pair.prefill.poisoned == {2}, "not proved stopped: no ACK, ever"
        assert pair.prefill._staging_outstanding[2] == 1
    assert pair.prefill.request_status[2] == KVPoll.Failed
    assert pair.session not in pair.prefill.failed_sessions, "an abort says nothing about the decode engine"
    pair.prefill._pdx = engine
    pair.open(3, [6])
    pair.send(3, [4], 0, last=True)
    assert pair.concluded(3)[0] == KVPoll.Success


def test_requests_to_one_decode_rank_move_at_once_and_chunks_of_one_in_order(pair: Pair) -> None:
    pair.open(1, [5])
    pair.send(1, [4], 0, last=True)
    assert pair.concluded(1)[0] == KVPoll.Success
    batch, engine = Stuck(stops=True), pair.prefill._pdx
    pair.prefill._pdx = StuckEngine(engine, batch)
    pair.open(2, [6, 7])
    pair.send(2, [4], 0, last=False)
    pair.send(2, [5], 1, last=True)
    until(lambda: pair.prefill._staging_outstanding.get(2, 0) == 1)
    pair.prefill._pdx = engine  # room 2's first chunk stays in flight
    pair.open(3, [8])
    pair.send(3, [9], 0, last=True)
    assert pair.concluded(3)[0] == KVPoll.Success, "room 3 had to wait for room 2"
    assert np.array_equal(pair.d.kv[0][8], pair.p.kv[0][9])
    assert not pair.d.kv[0][7].any(), "a later chunk of room 2 overtook the one in flight"
    assert not any(entry[0] == 2 for entry in pair.prefill.statuses)
    pair.prefill.update_status(2, KVPoll.Failed)
    assert pair.concluded(2)[0] == KVPoll.Failed


class Event:
    """What SGLang records on a CUDA stream: until it is waited for, its work is not done."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def synchronize(self) -> None:
        self._work()


def test_events_are_waited_for_before_pages_or_their_numbers_are_read(pair: Pair) -> None:
    pair.open(1, [6])
    numbers = np.full(1, 31, np.int32)
    chunk = Chunk(1, numbers, slice(0, 1), True, 1)
    chunk.indices_event = Event(lambda: numbers.fill(4))
    chunk.wait_event = Event(lambda: pair.p.kv[0].fill(77))
    pair.p.kv[0][31] = 99
    pair.prefill.transfer_queues[0].put(chunk)
    assert pair.concluded(1)[0] == KVPoll.Success
    assert (pair.d.kv[0][6] == 77).all() and np.array_equal(pair.d.kv[1][6], pair.p.kv[1][4])


def test_an_event_that_fails_ends_its_room_only(pair: Pair) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pair.open(1, [6])
    pair.send(1, [4], 0, last=True, wait_event=Event(broken))
    status, reason = pair.concluded(1)
    assert status == KVPoll.Failed and "illegal memory access" in str(reason)
    assert 1 not in pair.prefill.poisoned
    pair.open(3, [6])
    pair.send(3, [4], 0, last=True)
    assert pair.concluded(3)[0] == KVPoll.Success


def test_a_link_without_host_memory_gets_the_row_by_the_control_socket_after_the_pages(pair: Pair) -> None:
    pair.decode.engine.batch_deregister(pair.d.args.aux_data_ptrs)  # as a link between GPUs looks to the prefill rank
    pair.prefill._on_gpu = True
    until(lambda: pair.prefill._links.get(pair.session).find_region(pair.d.args.kv_data_ptrs[0], 1, 5.0))
    until(lambda: len(pair.prefill._links.get(pair.session).regions) == len(pair.d.kv))
    for room, src, dst in ((1, [4], [6]), (2, [], [])):  # the second has no page left, only its row
        pair.open(room, dst)
        pair.send(room, src, 0, last=True)
        assert pair.concluded(room)[0] == KVPoll.Success
    assert pair.prefill.rows_by_socket == [(1, 1, 3, 0), (2, 1, 3, 1)], "each once, before its room's Success"
    assert np.array_equal(pair.d.kv[0][6], pair.p.kv[0][4])
    assert not pair.d.aux[0].any()


def test_a_link_with_host_memory_writes_the_row_itself_on_a_gpu_server_too(pair: Pair) -> None:
    pair.prefill._on_gpu = True
    pair.open(1, [6])
    pair.send(1, [4], 0, last=True)
    assert pair.concluded(1)[0] == KVPoll.Success
    assert pair.prefill.rows_by_socket == [] and np.array_equal(pair.d.aux[0][3], pair.p.aux[0][1])


def test_every_manager_has_an_engine_of_its_own(pair: Pair, manager: type[Any]) -> None:
    ranks = [Rank(tp=2, rank=rank) for rank in range(2)]
    args = types.SimpleNamespace(device="cpu")
    more = [manager(rank.args, fake_sglang.DisaggregationMode.DECODE, args) for rank in ranks]
    try:
        assert len({m.get_session_id() for m in (*more, pair.decode, pair.prefill)}) == 4
        for m, rank in zip(more, ranks, strict=True):
            assert {r.pointer for r in m._memory.regions()} == {*rank.args.kv_data_ptrs, *rank.args.aux_data_ptrs}
    finally:
        for m in more:
            m.teardown()


def test_a_failed_room_stays_failed(pair: Pair) -> None:
    pair.prefill.request_status[1] = KVPoll.Failed
    pair.prefill.update_status(1, KVPoll.Success)
    assert pair.prefill.request_status[1] == KVPoll.Failed


def test_rows_without_a_factorised_form(pair: Pair) -> None:
    s, d = pair.p.args.kv_data_ptrs, pair.d.args.kv_data_ptrs
    assert pair.prefill._transfer_data(pair.session, [(s[0] + 10, d[1] + 20, 30), (s[3], d[3] + 1, 5)]) == 0
    assert np.array_equal(pair.d.kv[1].reshape(-1)[20:50], pair.p.kv[0].reshape(-1)[10:40])
    assert np.array_equal(pair.d.kv[3].reshape(-1)[1:6], pair.p.kv[3].reshape(-1)[:5])
    assert pair.prefill._transfer_data(pair.session, []) == 0
    from pdxfer.sglang.data_path import TransferEnded

    with pytest.raises(TransferEnded, match="has registered no memory"):
        pair.prefill._transfer_data(pair.session, [(s[0], 4096, 16)])


def test_memory_can_be_released_and_resumed(pair: Pair) -> None:
    pair.open(1, [5])
    pair.send(1, [4], 0, last=True)
    assert pair.concluded(1)[0] == KVPoll.Success
    for half in (pair.prefill, pair.decode):
        half.deregister_buffer_to_engine()
        half.register_buffer_to_engine()
    pair.prefill.decode_kv_args_table[pair.session] = pair.d.registration()
    pair.open(2, [6])
    pair.send(2, [9], 0, last=True)
    assert pair.concluded(2)[0] == KVPoll.Success
    assert np.array_equal(pair.d.kv[0][6], pair.p.kv[0][9])


def test_teardown_twice(pair: Pair) -> None:
    for _ in range(2):
        pair.prefill.teardown()
        pair.decode.teardown()
    assert pair.prefill.torn_down == 1
    assert not any(worker.is_alive() for worker in pair.prefill.workers)


def test_a_wrong_ib_device_stops_the_start(manager: type[Any]) -> None:
    args = types.SimpleNamespace(ib_device="mlx5_0,,", gpu_id=0)
    with pytest.raises(ValueError, match="--disaggregation-ib-device"):
        manager(args, fake_sglang.DisaggregationMode.DECODE, types.SimpleNamespace(device="cpu"))


def test_an_unregistered_decode_engine_is_named(pair: Pair) -> None:
    with pytest.raises(RuntimeError, match="decode engine 1.2.3.4:5 is not registered here"):
        pair.prefill.decode_kv_args_table["1.2.3.4:5"]


def test_probing_a_session(pair: Pair) -> None:
    assert pair.prefill.engine.send_probe(pair.session) == 0
    assert pair.prefill.engine.send_probe("127.0.0.1:1") == -1
