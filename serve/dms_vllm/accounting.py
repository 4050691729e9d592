"""vLLM's blocks as vouchers for pages: the spec of the pool, and the manager that takes and gives back what the ledger says."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from dms_vllm.events import Began, Ended, Event
from dms_vllm.vouchers import Geometry, Ledger, Report


@dataclass(frozen=True, kw_only=True)
class PoolSpec(AttentionSpec):
    """Of the one "layer" that vLLM sees. A block is a voucher; its size in tokens is the longest request, so that a block table has one entry,
    which names the request."""

    dcp_sharded: bool = False
    geometry: Geometry

    @classmethod
    def of(cls, geometry: Geometry, page_bytes: int, max_tokens: int) -> "PoolSpec":
        """page_bytes: of a page. max_tokens: of the longest request."""
        # Anything but an AttentionSpec is refused where blocks are divided for kernels; one byte of one head makes its sizes ours.
        return cls(
            geometry=geometry,
            block_size=max_tokens,
            num_kv_heads=1,
            head_size=1,
            dtype=torch.int8,
            tokens_per_state=-1,
            state_content_bytes=geometry.pages_per_voucher * page_bytes,
        )

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request that evicts nothing: it must fit, or it would preempt itself for ever."""
        return self.geometry.of_longest(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        return 1

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False


class PoolManager(SingleTypeKVCacheManager):
    """Holds for each request as many blocks as the ledger says; its first one names it to the workers, and the others never leave here."""

    def __init__(self, kv_cache_spec: PoolSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self.ledger = Ledger(kv_cache_spec.geometry)
        self.further: defaultdict[str, list[KVCacheBlock]] = defaultdict(list)
        """Of each request its blocks beyond the first."""
        self.prompts: dict[str, int] = {}
        """Tokens of the prompts of requests that vLLM is about to let begin."""
        self.names: dict[str, str] = {}
        """What the workers call each request: another name for each of its lives, since a report on one may come after its end."""
        self.lives = itertools.count()
        self.events: list[Event] = []
        self.peak = 0
        """The most blocks that requests held."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        if not apply_admission_cap:
            return self.ledger.needed(request_id, num_tokens)
        # Asked for where vLLM wants to know whether a whole prompt fits.
        self.prompts[request_id] = num_tokens
        return self.ledger.admission(request_id, num_tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        missing = self.ledger.schedule(request_id, num_tokens, self.prompts.pop(request_id, 0))
        if missing == 0:
            return []
        blocks = self.block_pool.get_new_blocks(missing)
        first = []
        if not self.req_to_blocks[request_id]:
            first, blocks = blocks[:1], blocks[1:]
            self.req_to_blocks[request_id].extend(first)
            self.names[request_id] = f"{request_id}#{next(self.lives)}"
            self.events.append(Began(self.names[request_id], first[0].block_id))
        self.further[request_id].extend(blocks)
        self.peak = max(self.peak, self.ledger.num_held)
        return first

    def report(self, reports: dict[str, Report]) -> None:
        """What requests hold after a step; blocks that they need no longer go back."""
        for name, report in reports.items():
            request_id = name.rpartition("#")[0]
            if self.names.get(request_id) != name:
                continue
            surplus = self.ledger.report(request_id, report)
            if surplus:
                further = self.further[request_id]
                self.block_pool.free_blocks(further[len(further) - surplus :])
                del further[len(further) - surplus :]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id) + self.further.pop(request_id, [])
        self.prompts.pop(request_id, None)
        freed = self.ledger.free(request_id)
        assert freed == len(blocks), "the ledger and the blocks agree"
        if blocks:
            self.events.append(Ended(self.names.pop(request_id)))
        return blocks

    def take_events(self) -> list[Event]:
        """What happened since the step before, in order."""
        events, self.events = self.events, []
        return events

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """None: blocks hold no tokens."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def cache_blocks(
        self, request: Any, num_tokens: int, retention_interval: int | None = None, *, replay_boundaries: Sequence[int] = ()
    ) -> None:
        return

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        return


def register() -> None:
    # Registering first would keep vLLM from registering its own: it looks whether there is any.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(PoolSpec, PoolManager, PoolSpec)
