"""The rank table of a prefill server: SGLang's own, unchanged.

It runs in the server's main process. A subclass, so that SGLang's Rust registry, which stands in for servers derived
from the common one, stands in for this one too.
"""

from sglang.srt.disaggregation.mooncake.conn import MooncakeKVBootstrapServer


class PdxKVBootstrapServer(MooncakeKVBootstrapServer):  # type: ignore[misc]
    """Where ranks of a prefill server are looked up by decode servers."""
