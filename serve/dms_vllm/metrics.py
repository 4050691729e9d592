"""What vLLM's log and its Prometheus endpoint say of the pool: entries alive, what they are of, and bytes."""

from dataclasses import dataclass
from typing import Any

from prometheus_client import Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats


@dataclass
class PoolStats(KVConnectorStats):
    """data: by rank, as a string, what `Worker.held` says. Of one rank the latest counts, of several their sum."""

    def aggregate(self, other: "KVConnectorStats") -> "PoolStats":
        return PoolStats({**self.data, **other.data})

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def sums(self) -> dict[str, float]:
        """entries, seen and bytes of all ranks, and cr, the tokens seen over the entries alive; 1 while there are none."""
        entries, seen, held = (sum(rank[name] for rank in self.data.values()) for name in ("entries", "seen", "bytes"))
        return {"entries": entries, "seen": seen, "bytes": held, "cr": seen / entries if entries else 1.0}

    def reduce(self) -> dict[str, int | float]:
        sums = self.sums()
        return {"DMS entries alive": sums["entries"], "CR": round(sums["cr"], 2), "live MB": round(sums["bytes"] / 1e6, 2)}


_GAUGES = {
    "entries": ("dms:entries_alive", "KV entries of running requests that their gates have not evicted, over all layers and KV heads."),
    "bytes": ("dms:live_bytes", "Bytes of the pages in use, of prefixes too, and of the running requests' rings."),
    "cr": ("dms:compression_ratio", "Tokens of running requests over their entries alive, in the mean over layers and KV heads."),
}


class PoolMetrics(KVConnectorPromMetrics):
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self.gauges = {
            name: metric_types[Gauge](name=metric, documentation=words, labelnames=labelnames) for name, (metric, words) in _GAUGES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        sums = PoolStats(transfer_stats_data).sums()
        for name, gauge in self.gauges.items():
            gauge.labels(*self.per_engine_labelvalues[engine_idx]).set(sums[name])
