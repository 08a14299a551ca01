"""Peers by session id, and the watch that notices when one is gone.

A session id is the address of the other rank's engine. A prefill rank connects to decode ranks as they register and
introduces itself (`wire`); a decode rank is connected to. One watch thread per manager looks at the engine's peers, so
that the requests of a dead server fail at once and not after missed heartbeats or a timeout.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pdxfer
from pdxfer.sglang import wire

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
WATCH_S = 0.1


class PeerLinks:
    """Connections of a prefill rank. Any thread; connecting to one session at a time, to several at once.

    Args:
        engine: the pdxfer engine.
        endpoint: ``ip:port`` of this rank's control socket, which the decode side knows it by.
    """

    def __init__(self, engine: Any, endpoint: Callable[[], str]) -> None:
        self._engine = engine
        self._endpoint = endpoint
        self._guard = threading.Lock()
        self._peers: dict[str, Any] = {}
        self._connecting: dict[str, threading.Lock] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def get(self, session: str) -> Any:
        """The peer of a session, connected now if it is not.

        Raises:
            pdxfer.PdxferError: it cannot be reached; the text says why.
        """
        with self._guard:
            if self._closed:
                raise pdxfer.UnavailableError("this rank's engine is closing")
            peer = self._peers.get(session)
            if peer is not None and peer.alive:
                return peer
            lock = self._connecting.setdefault(session, threading.Lock())
        with lock:
            with self._guard:
                peer = self._peers.get(session)
            if peer is not None and peer.alive:
                return peer
            peer = self._engine.connect(str(session), timeout=CONNECT_S)
            hello = wire.encode_hello(self._endpoint())
            self._engine.submit(peer, pdxfer.make_plan(parts=[]), tag=wire.HELLO_TAG, tail=hello)
            with self._guard:
                self._peers[session] = peer
            logger.info("pdxfer: connected to decode engine %s over %s", session, peer.transport)
            return peer

    def connect_soon(self, session: str) -> None:
        """Connect in the background, so that the first transfer finds the link and the decode side knows this rank."""
        thread = threading.Thread(target=self._try, args=(session,), name="pdxfer-connect", daemon=True)
        with self._guard:
            self._threads.add(thread)
        thread.start()

    def _try(self, session: str) -> None:
        try:
            self.get(session)
        except pdxfer.PdxferError as error:
            logger.warning("pdxfer: no link to decode engine %s yet: %s", session, error)
        finally:
            with self._guard:
                self._threads.discard(threading.current_thread())

    def close(self) -> None:
        """Refuse new connections and wait for those under way, so that the engine may be closed. Idempotent."""
        with self._guard:
            self._closed = True
            threads = list(self._threads)
        for thread in threads:
            thread.join(2 * CONNECT_S)

    def take_lost(self) -> dict[str, str]:
        """Sessions whose peer is gone, with the reason; each is reported once."""
        with self._guard:
            lost = {session: peer for session, peer in self._peers.items() if not peer.alive}
            for session in lost:
                del self._peers[session]
                self._connecting.pop(session, None)
        return {session: peer.lost_reason or "the link is down" for session, peer in lost.items()}


class PrefillRanks:
    """What a decode rank knows of the prefill ranks that connected to it. Any thread.

    Args:
        engine: the pdxfer engine.
        retire: called with the endpoint of each rank that is gone, by the thread that calls `take_lost`.
    """

    def __init__(self, engine: Any, retire: Callable[[str], None]) -> None:
        self._engine = engine
        self._retire = retire
        self._guard = threading.Lock()
        self._greeted: dict[int, str] = {}  # peer id -> endpoint, not yet seen in the engine's list
        self._alive: dict[int, str] = {}  # peer id -> endpoint
        self._servers: dict[str, set[str]] = {}  # endpoint -> bootstrap addresses it was found under

    def note(self, bootstrap_addr: str, endpoints: list[str]) -> None:
        """The server at `bootstrap_addr` consists of the ranks at `endpoints`."""
        with self._guard:
            for endpoint in endpoints:
                self._servers.setdefault(endpoint, set()).add(bootstrap_addr)

    def take_lost(self) -> dict[str, str]:
        """Bootstrap addresses of servers that lost a rank, with the reason; each is reported once."""
        greetings = {}
        for arrival in self._engine.poll():
            endpoint = wire.decode_hello(arrival.tail) if arrival.ok and arrival.tag == wire.HELLO_TAG else None
            if endpoint is not None:
                greetings[arrival.peer_id] = endpoint
        peers = {peer.id: peer for peer in self._engine.peers()}
        with self._guard:
            self._greeted.update(greetings)
            # A hello may be here a moment before its peer is listed, so only a listed peer counts as alive or dead.
            for peer_id in [known for known in self._greeted if known in peers]:
                self._alive[peer_id] = self._greeted.pop(peer_id)
            gone = [peer_id for peer_id in self._alive if peer_id not in peers or not peers[peer_id].alive]
            ended = {peer_id: self._alive.pop(peer_id) for peer_id in gone}
            reasons = {
                endpoint: (peers[peer_id].lost_reason if peer_id in peers else "") or "the link is down"
                for peer_id, endpoint in ended.items()
                if endpoint not in self._alive.values()  # else the same rank has connected anew
            }
            lost = self._servers_of(reasons)
        for endpoint in reasons:
            self._retire(endpoint)
        return lost

    def _servers_of(self, ended: dict[str, str]) -> dict[str, str]:
        """Forget the servers that the ranks at these endpoints belonged to, and say which. Holds the guard."""
        lost: dict[str, str] = {}
        for endpoint, reason in ended.items():
            for server in self._servers.pop(endpoint, set()):
                lost[server] = f"rank {endpoint}: {reason}"
        for servers in self._servers.values():  # their other ranks are of the past too: a restart has new endpoints
            servers -= lost.keys()
        return lost


class Watch:
    """A thread that calls `look` every WATCH_S seconds until stopped. Logs what `look` raises and goes on."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pdxfer-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and join. Idempotent; harmless before `start` and from the watch's own thread."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while not self._stop.wait(WATCH_S):
            try:
                self._look()
            except Exception:
                logger.exception("pdxfer: the watch over peers failed; it goes on")
