"""What the plugin touches of vLLM (docs/upstream.md) is there, with the parameters that ours have. The other tests here hold what it does."""

import importlib
import inspect
import re
from dataclasses import fields

import pytest

pytest.importorskip("vllm", reason="serving is tested in an environment of its own: scripts/test_serving.sh")

from vllm_touches import TOUCHES

CLASSES = {
    "dms_vllm.accounting": ["PoolSpec", "PoolManager"],
    "dms_vllm.configuration": ["DMSConfiguration"],
    "dms_vllm.connector": ["Events", "Reports", "DMSConnector"],
    "dms_vllm.metrics": ["PoolStats", "PoolMetrics"],
    "dms_vllm.model": ["StepBuilder", "PoolBackend", "Pool", "DMSForCausalLM"],
}
# What vLLM calls of them; the rest of theirs is ours.
CALLED = {
    "PoolSpec": "max_memory_usage_bytes max_num_blocks_per_req block_table_token_alignment prefix_cacheable uses_slot_mapping",
    "PoolManager": "get_num_blocks_to_allocate allocate_new_blocks pop_blocks_for_free find_longest_cache_hit cache_blocks "
    "allocate_external_computed_blocks add_local_computed_blocks remove_skipped_blocks",
    "DMSConfiguration": "verify_and_update_config",
    "Events": "",
    "Reports": "aggregate",
    "DMSConnector": "requires_kv_delivery bind_kv_cache_manager get_num_new_matched_tokens update_state_after_alloc build_connector_meta "
    "update_connector_output request_finished request_finished_all_groups bind_connector_metadata build_connector_worker_meta "
    "get_kv_connector_stats build_kv_connector_stats build_prom_metrics start_load_kv wait_for_layer_load save_kv_layer wait_for_save",
    "PoolStats": "aggregate reset is_empty reduce",
    "PoolMetrics": "observe",
    "StepBuilder": "build",
    "PoolBackend": "get_name get_impl_cls get_builder_cls",
    "Pool": "get_attn_backend get_kv_cache_spec bind_kv_cache",
    "DMSForCausalLM": "_get_attn_cls _create_attention_instances load_weights",
}
METHODS = [(module, name, method) for module, names in CLASSES.items() for name in names for method in CALLED[name].split()]
# Attributes that are read of what vLLM hands us: fields of dataclasses, or names of which a class speaks.
FIELDS = {
    "vllm.config.VllmConfig": "model_config cache_config parallel_config compilation_config speculative_config lora_config kv_transfer_config "
    "additional_config",
    "vllm.config.ModelConfig": "model revision max_model_len dtype",
    "vllm.config.CacheConfig": "cache_dtype enable_prefix_caching user_specified_block_size kv_cache_memory_bytes",
    "vllm.config.ParallelConfig": "pipeline_parallel_size decode_context_parallel_size",
    "vllm.config.CompilationConfig": "static_forward_context splitting_ops",
    "vllm.config.KVTransferConfig": "kv_connector kv_role",
    "vllm.forward_context.ForwardContext": "attn_metadata no_compile_layers",
    "vllm.v1.attention.backend.CommonAttentionMetadata": "query_start_loc_cpu seq_lens block_table_tensor num_reqs",
    "vllm.v1.outputs.KVConnectorOutput": "kv_connector_worker_meta",
}
SPOKEN_OF = {
    "vllm.v1.request.Request": "request_id num_prompt_tokens num_tokens all_token_ids cache_salt num_computed_tokens skip_reading_prefix_cache "
    "is_finished get_finished_reason",
    "vllm.v1.core.block_pool.BlockPool": "get_num_free_blocks get_new_blocks free_blocks",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": "req_to_blocks block_pool",
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.kv_cache_manager.KVCacheManager": "coordinator",
    "vllm.model_executor.models.transformers.base.Base": "attention_fusers text_config model_config vllm_config device_config",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1": "_vllm_config role",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorPromMetrics": "per_engine_labelvalues",
    "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry": "_ensure_registered register",
    "vllm.distributed.kv_transfer.kv_connector.factory.KVConnectorFactory": "register_connector",
}


def named(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", sorted(TOUCHES))
def test_what_is_imported_is_there(name):
    assert named(name) is not None


@pytest.mark.parametrize(("module", "name", "method"), METHODS, ids=lambda part: part.removeprefix("dms_vllm."))
def test_what_vllm_calls_takes_what_vllm_gives(module, name, method):
    ours = getattr(importlib.import_module(module), name)
    base = next((cls for cls in ours.__mro__[1:] if method in vars(cls)), None)
    assert base is not None and base.__module__.startswith("vllm."), f"vLLM has no {method} any more"
    own, theirs = inspect.getattr_static(ours, method), inspect.getattr_static(base, method)
    assert isinstance(own, property) == isinstance(theirs, property)
    if isinstance(own, property):
        return
    given = list(inspect.signature(getattr(base, method)).parameters.values())
    taken = inspect.signature(getattr(ours, method)).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    for place, parameter in enumerate(given):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in taken:
            positional = [p.name for p in taken.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            assert parameter.kind is parameter.KEYWORD_ONLY or positional[place] == parameter.name, f"{parameter.name} stands elsewhere"
        else:
            assert parameter.VAR_KEYWORD in kinds, f"vLLM gives {parameter.name}, which ours does not take"
    for parameter in taken.values():
        required = parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        assert not required or parameter.name in [p.name for p in given], f"vLLM does not give {parameter.name}"


@pytest.mark.parametrize(("name", "attributes"), FIELDS.items(), ids=lambda part: part.rpartition(".")[2])
def test_fields_that_are_read(name, attributes):
    assert set(attributes.split()) <= {field.name for field in fields(named(name))}


@pytest.mark.parametrize(("name", "attributes"), SPOKEN_OF.items(), ids=lambda part: part.rpartition(".")[2])
def test_attributes_that_are_read(name, attributes):
    cls = named(name)
    text = "".join(inspect.getsource(one) for one in cls.__mro__ if one.__module__.startswith("vllm."))
    absent = [word for word in attributes.split() if not hasattr(cls, word) and not re.search(rf"self\.{word}\b.*=", text)]
    assert not absent


@pytest.mark.parametrize("given", [None, ["mine::op"]])
def test_graphs_are_divided_at_our_attention(given):
    """As at vLLM's own, which makes a captured whole of a step impossible and captured parts right."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    from dms_vllm import ATTEND
    from dms_vllm.configuration import divide_graphs
    from dms_vllm.model import StepBuilder

    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, splitting_ops=given)
    divide_graphs(config)
    divide_graphs(config)
    config.set_splitting_ops_for_v1("naive")
    assert config.splitting_ops.count(ATTEND) == 1 and ("mine::op" in config.splitting_ops) == (given is not None)
    assert StepBuilder._cudagraph_support == AttentionCGSupport.NEVER
    if given is None:
        assert config.splitting_ops_contain_attention(), "else vLLM would capture nothing, or the whole"


def test_connectors_come_last_before_a_forward():
    """The workers hear what the scheduler says between the step's spans and the first layer."""
    from vllm.v1.worker import gpu_model_runner

    text = inspect.getsource(gpu_model_runner.GPUModelRunner.execute_model)
    assert 0 < text.index("_build_attention_metadata(") < text.index("maybe_get_kv_connector_output(") < text.index("_model_forward(")
