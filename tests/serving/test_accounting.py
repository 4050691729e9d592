"""The scheduler's side of prefixes, with vLLM's pool of blocks and without its engine."""

from types import SimpleNamespace

import pytest
from vllm.v1.core.block_pool import BlockPool

from dms_vllm.accounting import PoolManager, PoolSpec
from dms_vllm.events import Began, DroppedFork, Ended, KeepFork
from dms_vllm.vouchers import Geometry


def request(name: str):
    tokens = list(range(300))
    return SimpleNamespace(
        request_id=name, all_token_ids=tokens, num_prompt_tokens=300, num_tokens=300, cache_salt=None, skip_reading_prefix_cache=False
    )


@pytest.fixture
def manager():
    geometry = Geometry(lines=4, windows=(16,), page_size=16, pages_per_voucher=4)
    spec = PoolSpec.of(geometry, page_bytes=64, max_tokens=400, prefix_every=100, kept=1.0)
    return PoolManager(spec, block_pool=BlockPool(200, False, 400), enable_caching=False, kv_cache_group_id=0, scheduler_block_size=400)


def begin(manager: PoolManager) -> None:
    """A request that a step reads up to token 250, whose prefixes of 100 and 200 tokens it will make."""
    assert manager.find_prefix(request("a")) == 0
    manager.allocate_new_blocks("a", 250, 250)
    assert [type(event) for event in manager.events] == [Began, KeepFork, KeepFork]


def test_a_prefix_is_found_once_the_step_that_makes_it_is_on_its_way(manager):
    begin(manager)
    assert manager.find_prefix(request("b")) == 0
    manager.take_events()
    assert manager.find_prefix(request("b")) == 200


def test_what_a_preempted_request_was_to_keep_is_dropped(manager):
    """In the step that has scheduled it already, as vLLM's priorities do."""
    free = manager.block_pool.get_num_free_blocks()
    begin(manager)
    manager.block_pool.free_blocks(manager.pop_blocks_for_free("a"))
    events = manager.take_events()
    assert [type(event) for event in events[3:]] == [Ended, DroppedFork, DroppedFork]
    assert manager.find_prefix(request("b")) == 0 and not manager.prefixes.by_name
    assert manager.block_pool.get_num_free_blocks() == free and manager.ledger.num_held == 0


def test_what_it_kept_in_steps_before_stays(manager):
    begin(manager)
    manager.take_events()
    manager.block_pool.free_blocks(manager.pop_blocks_for_free("a"))
    assert manager.find_prefix(request("b")) == 200
