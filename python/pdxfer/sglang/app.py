"""SGLang's HTTP application for tokenizer workers, with plugins loaded first.

With ``--tokenizer-worker-num`` above 1 each worker imports the application by name in a fresh process, and SGLang loads
no plugin there; its look-up of the transfer backend would fail. `register` points SGLang at this module instead.
"""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402

__all__ = ["app"]
