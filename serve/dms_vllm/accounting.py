"""vLLM's blocks as vouchers for pages: the spec of the pool, and the manager that takes and gives back what the ledger says."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from dms_vllm.events import BecameFork, Began, DroppedFork, Ended, Event, KeepFork
from dms_vllm.prefixes import Prefixes
from dms_vllm.vouchers import Geometry, Ledger, Report


@dataclass(frozen=True, kw_only=True)
class PoolSpec(AttentionSpec):
    """Of the one "layer" that vLLM sees. A block is a voucher; its size in tokens is the longest request, so that a block table has one entry,
    which names the request."""

    dcp_sharded: bool = False
    geometry: Geometry
    prefix_every: int
    """As in `settings.Options`."""
    kept: float
    """The share of its entries that a prompt is expected to keep, until requests have shown theirs."""

    @classmethod
    def of(cls, geometry: Geometry, page_bytes: int, max_tokens: int, prefix_every: int, kept: float) -> "PoolSpec":
        """page_bytes: of a page. max_tokens: of the longest request."""
        # Anything but an AttentionSpec is refused where blocks are divided for kernels; one byte of one head makes its sizes ours.
        return cls(
            geometry=geometry,
            prefix_every=prefix_every,
            kept=kept,
            block_size=max_tokens,
            num_kv_heads=1,
            head_size=1,
            dtype=torch.int8,
            tokens_per_state=-1,
            state_content_bytes=geometry.pages_per_voucher * page_bytes,
        )

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request that evicts nothing: it must fit, or it would preempt itself for ever. vLLM refuses where it does not.

        Raises:
            ValueError: memory that was given as a number of bytes, and is too little; vLLM's own message has GiB, of which that may be 0.0.
        """
        given = vllm_config.cache_config.kv_cache_memory_bytes
        if given is not None:
            # One block is vLLM's own.
            self.geometry.check_pool(given // self.page_size_bytes - 1, vllm_config.model_config.max_model_len)
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
        self.ledger = Ledger(kv_cache_spec.geometry, kept=kv_cache_spec.kept)
        self.further: defaultdict[str, list[KVCacheBlock]] = defaultdict(list)
        """Of each request its blocks beyond the first."""
        self.prompts: dict[str, int] = {}
        """Tokens of the prompts of requests that vLLM is about to let begin."""
        self.prefix_every = kv_cache_spec.prefix_every
        self.prefixes = Prefixes()
        self.blocks_of_prefixes: dict[str, list[KVCacheBlock]] = {}
        self.requests: dict[str, Any] = {}
        """vLLM's, of those that wait or run."""
        self.began_from: dict[str, str] = {}
        """The prefix of requests that begin from one, until they have begun."""
        self.names: dict[str, str] = {}
        """What the workers call each request: another name for each of its lives, since a report on one may come after its end."""
        self.lives = itertools.count()
        self.events: list[Event] = []
        self.to_come: dict[str, str] = {}
        """Prefixes that the step being scheduled will make, and of which request: nobody begins from them in this step."""
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
        if apply_admission_cap:
            # Asked for where vLLM wants to know whether a whole prompt fits.
            self.prompts[request_id] = num_tokens
            needed = self.ledger.admission(request_id, num_tokens)
        else:
            needed = self.ledger.needed(request_id, num_tokens)
        self._make_room(needed)
        return needed

    def _make_room(self, num_blocks: int) -> None:
        """Let prefixes go that nobody uses, the oldest first, until so many blocks are free or none is left."""
        while self.block_pool.get_num_free_blocks() < num_blocks:
            unused = next((name for name in self.prefixes.oldest_first() if self.ledger.holders[name].users == 0), None)
            if unused is None:
                return
            self._drop_prefix(unused)

    def _drop_prefix(self, name: str) -> None:
        self.prefixes.drop(name)
        self.to_come.pop(name, None)
        self.ledger.free(name)
        self.block_pool.free_blocks(self.blocks_of_prefixes.pop(name))
        self.events.append(DroppedFork(name))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        begins = not self.req_to_blocks[request_id]
        prompt = self.prompts.pop(request_id, 0)
        if begins:
            # Its name is the first block's, which it keeps.
            before = self.ledger.holders[request_id].scheduled if request_id in self.ledger.holders else 0
            self._take(request_id, self.ledger.schedule(request_id, before + 1, prompt))
            first = self.further[request_id].pop(0)
            self.req_to_blocks[request_id].append(first)
            self.names[request_id] = f"{request_id}#{next(self.lives)}"
            self.events.append(Began(self.names[request_id], first.block_id, self.began_from.pop(request_id, None)))
        self._keep_forks(request_id, num_tokens)
        self._take(request_id, self.ledger.schedule(request_id, num_tokens, prompt))
        self.peak = max(self.peak, self.ledger.num_held)
        return self.req_to_blocks[request_id][:1] if begins else []

    def _finishes(self, prefix_vouchers: int, start: int) -> bool:
        """As `Ledger.finishes`, in this pool."""
        return self.ledger.finishes(prefix_vouchers, start, self.kv_cache_spec.block_size, self.block_pool.num_gpu_blocks - 1)

    def _take(self, holder: str, num_blocks: int) -> None:
        if num_blocks:
            self.further[holder].extend(self.block_pool.get_new_blocks(num_blocks))

    def _keep_forks(self, request_id: str, num_tokens: int) -> None:
        """Keep prefixes of the request's prompt that the tokens up to num_tokens complete, where there are blocks for them."""
        request, every = self.requests.get(request_id), self.prefix_every
        if request is None or not every:
            return
        geometry, scheduled = self.ledger.geometry, self.ledger.holders[request_id].scheduled
        for at in range(scheduled // every * every + every, min(num_tokens, request.num_prompt_tokens) + 1, every):
            one = self.ledger.holders[request_id]
            of_prefix = self.ledger.of_prefixes(one.prefix) + one.held + self.ledger.needed(request_id, at)
            if not self._finishes(of_prefix, at):
                continue
            after = max(self.ledger.fork_vouchers, geometry.vouchers(geometry.open_pages + geometry.growth(at, num_tokens)))
            blocks = self.ledger.needed(request_id, at) + after
            self._make_room(blocks)
            if self.block_pool.get_num_free_blocks() < blocks:
                continue
            prefix = self.prefixes.add(request.all_token_ids[:at], request.cache_salt)
            if prefix is None:
                continue
            self._take(request_id, self.ledger.schedule(request_id, at))
            taken = self.block_pool.get_new_blocks(self.ledger.fork(request_id, prefix.name))
            # The request's first block stays its own.
            self.blocks_of_prefixes[prefix.name] = [*self.further[request_id], taken[0]]
            self.further[request_id] = taken[1:]
            self.to_come[prefix.name] = request_id
            self.events.append(KeepFork(self.names[request_id], at, prefix.name))

    def report(self, reports: dict[str, Report]) -> None:
        """What requests and new prefixes hold after a step; blocks that they need no longer go back."""
        for name, report in reports.items():
            if name in self.blocks_of_prefixes:
                holder, blocks = name, self.blocks_of_prefixes[name]
            else:
                holder = name.rpartition("#")[0]
                if self.names.get(holder) != name:
                    # It ended while the step ran.
                    continue
                blocks = self.further[holder]
            surplus = self.ledger.report(holder, report)
            if surplus:
                self.block_pool.free_blocks(blocks[len(blocks) - surplus :])
                del blocks[len(blocks) - surplus :]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id) + self.further.pop(request_id, [])
        self.prompts.pop(request_id, None)
        self.began_from.pop(request_id, None)
        freed = self.ledger.free(request_id)
        assert freed == len(blocks), "the ledger and the blocks agree"
        if blocks:
            self.events.append(Ended(self.names.pop(request_id)))
        # Preempted by another in the step that would have made them.
        for name in [name for name, of in reversed(self.to_come.items()) if of == request_id]:
            self._drop_prefix(name)
        return blocks

    # Prefixes, as the connector hears of requests.

    def find_prefix(self, request: Any) -> int:
        """How many tokens a request that waits can begin with; it then holds on to them, until it begins or is asked about again."""
        self.requests[request.request_id] = request
        request_id = request.request_id
        if not self.prefix_every or request.skip_reading_prefix_cache or self.req_to_blocks.get(request_id):
            return 0
        if self.began_from.pop(request_id, None) is not None:
            self.ledger.free(request_id)
        # The last token's logits are wanted.
        prefix = self.prefixes.find(request.all_token_ids, request.cache_salt, request.num_tokens - 1, besides=self.to_come)
        if prefix is None or not self._finishes(self.ledger.of_prefixes(prefix.name), len(prefix.tokens)):
            return 0
        self.began_from[request_id] = prefix.name
        return self.ledger.begin(request_id, prefix.name)

    def finished(self, request: Any) -> None:
        """A request is about to be freed: what it has is kept for one that goes on from it."""
        request_id = request.request_id
        self.requests.pop(request_id, None)
        one = self.ledger.holders.get(request_id)
        blocks = self.req_to_blocks.get(request_id)
        if not self.prefix_every or not blocks or one is None or request.num_computed_tokens != one.scheduled:
            return
        aborted = request.is_finished() and request.get_finished_reason() == FinishReason.ABORT
        # Scheduled ahead of what is known, the cache has a token that is not.
        if aborted or len(request.all_token_ids) < one.scheduled:
            return
        prefix = self.prefixes.add(request.all_token_ids[: one.scheduled], request.cache_salt)
        if prefix is None:
            return
        self.ledger.keep(request_id, prefix.name)
        self.blocks_of_prefixes[prefix.name] = [*self.req_to_blocks.pop(request_id), *self.further.pop(request_id, [])]
        self.events.append(BecameFork(self.names.pop(request_id), prefix.name))

    def forget_prefixes(self) -> bool:
        """Let all prefixes go that nobody uses; whether none is left."""
        while unused := [name for name in self.prefixes.oldest_first() if self.ledger.holders[name].users == 0]:
            for name in unused:
                self._drop_prefix(name)
        return not self.prefixes.by_name

    def take_events(self) -> list[Event]:
        """What happened since the step before, in order."""
        events, self.events = self.events, []
        self.to_come.clear()
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
        **further: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """None: blocks hold no tokens."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def cache_blocks(
        self, request: Any, num_tokens: int, retention_interval: int | None = None, *, replay_boundaries: Sequence[int] = ()
    ) -> None:
        return

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        return


# In every process that meets the spec, which imports this. Registering first would keep vLLM from registering its own: it looks whether there
# is any.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PoolSpec, PoolManager, PoolSpec)
