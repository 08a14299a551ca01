"""One request on the prefill side, on the scheduler's thread: SGLang's own, but for how page numbers come."""

import torch
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender


class PdxKVSender(MooncakeKVSender):  # type: ignore[misc]
    """Queues chunks for the manager's workers."""

    # With it SGLang hands over page numbers that a CUDA copy is still filling, and an event to wait for.
    supports_host_tensor_indices = torch.cuda.is_available()
