"""The wire between the scheduler and the workers: which requests begin and end goes down, and what they hold comes up."""

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from dms_vllm.accounting import PoolManager
from dms_vllm.events import Event
from dms_vllm.metrics import PoolMetrics, PoolStats
from dms_vllm.vouchers import Report

_SECONDS_BETWEEN_STATS = 1.0


@dataclass
class Events(KVConnectorMetadata):
    events: list[Event] = field(default_factory=list)


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """Of the requests of a step; of all ranks together."""

    reports: dict[str, Report]

    def aggregate(self, other: "Reports") -> "Reports":
        merged = dict(self.reports)
        for request, report in other.reports.items():
            merged[request] = report.merge(merged[request]) if request in merged else report
        return Reports(merged)


class DMSConnector(KVConnectorBase_V1, SupportsHMA):
    next_stats = 0.0

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # The scheduler's side.

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        managers = kv_cache_manager.coordinator.single_type_managers
        (self.manager,) = [manager for manager in managers if isinstance(manager, PoolManager)]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.manager.find_prefix(request), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        return

    def build_connector_meta(self, scheduler_output: Any) -> Events:
        return Events(self.manager.take_events())

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if meta is not None:
            self.manager.report(meta.reports)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.manager.finished(request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # A worker's side.

    def _pool(self) -> Any:
        from dms_vllm.model import POOL

        return self._vllm_config.compilation_config.static_forward_context[POOL]

    def bind_connector_metadata(self, connector_metadata: Events) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._pool().take_events(connector_metadata.events)

    def build_connector_worker_meta(self) -> Reports | None:
        return Reports(self._pool().report())

    def get_kv_connector_stats(self) -> PoolStats | None:
        if self.role is KVConnectorRole.SCHEDULER:
            return None
        # Counting reads all rings.
        now = time.monotonic()
        if now < self.next_stats:
            return None
        self.next_stats = now + _SECONDS_BETWEEN_STATS
        return PoolStats({str(get_tensor_model_parallel_rank()): self._pool().held()})

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PoolStats:
        return PoolStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> PoolMetrics:
        return PoolMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return
