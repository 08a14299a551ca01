"""The queues between a prefill rank's scheduler thread and its transfer workers, by room and not by decode rank.

SGLang gives every decode rank one queue, so one worker: a request waits until the one before it has arrived, also when
the link has room for both. Here a chunk goes to the queue of its room. Chunks of one request stay in order, because one
worker has them all, and everything that a worker keeps is kept per room (outstanding counts, ACKs, what is pending for
the last chunk); different requests to one decode rank move at once, as many as there are workers
(SGLANG_DISAGGREGATION_QUEUE_SIZE, 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RoomQueue:
    """One worker's queue, in the place of SGLang's; whatever is put into any of them goes to the queue of its room.

    `put` from any thread, `get` from the one worker. None, which tells a worker to stop, stays where it is put.
    """

    def __init__(self, own: Any, every: Sequence[Any]) -> None:
        self._own = own
        self._every = every

    def put(self, chunk: Any) -> None:
        queue = self._own if chunk is None else self._every[chunk.room % len(self._every)]
        queue.put(chunk)

    def get(self) -> Any:
        return self._own.get()


def by_room(queues: Sequence[Any]) -> list[RoomQueue]:
    """SGLang's queues, each wrapped."""
    every = list(queues)
    return [RoomQueue(queue, every) for queue in every]
