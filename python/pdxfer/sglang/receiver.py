"""One request on the decode side, on the scheduler's thread: SGLang's own, and a note of whom it waits for."""

from typing import Any

from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver


class PdxKVReceiver(MooncakeKVReceiver):  # type: ignore[misc]
    """Publishes pages to the prefill ranks and waits for their Success."""

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Look the prefill ranks up; the manager learns which ranks make up this prefill server."""
        super().init(*args, **kwargs)
        infos = getattr(self, "bootstrap_infos", None)
        if infos:
            self.kv_mgr.note_prefill_ranks(self.bootstrap_addr, infos)
