"""Dynamic Memory Sparsification: learned KV-cache eviction for pretrained decoders.

    model = dms.retrofit(model, dms.DMSConfig(window=64))     # attach gates; train them with `dms retrofit RECIPE`
    model = dms.load("runs/mine/model")                       # a retrofitted folder, evicting

Method: "Inference-Time Hyper-Scaling with KV Cache Compression", arXiv 2506.05345.
"""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "CacheBudget": "dms.cache",
    "DMSCache": "dms.cache",
    "DMSConfig": "dms.config",
    "PrefixStore": "dms.cache.prefix_store",
    "Prompt": "dms.batching",
    "generate_batch": "dms.batching",
    "retrofit": "dms.retrofitting",
    "load": "dms.io.checkpoint",
    "save": "dms.io.checkpoint",
    "set_mode": "dms.modes",
}
__all__ = ["CacheBudget", "DMSCache", "DMSConfig", "PrefixStore", "Prompt", "generate_batch", "load", "retrofit", "save", "set_mode"]


def __getattr__(name: str):
    # Heavy imports (torch, transformers) wait for their first use, so that `dms --help` is instant.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
