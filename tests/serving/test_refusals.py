"""What does not go with evicting gates is refused by name, before anything is loaded."""

import re
from pathlib import Path

import pytest
from served import ROOT, dense_bytes, fail_to_start, make_folder, run_engine, with_other_weights

CONFIGS = Path(__file__).with_name("configs.py")
REFUSED = {
    "speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding does not go with evicting gates: rejected tokens' evictions can't be taken back; leave it out",
    ),
    "pipeline": (
        {"pipeline_parallel_size": 2},
        "pipeline_parallel_size is 2, and the pages of all layers are in one pool; use tensor_parallel_size",
    ),
    "context parallel": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "decode_context_parallel_size divides each request's entries, and gates evict them by head; use tensor_parallel_size",
    ),
    "lora": ({"enable_lora": True}, "LoRA adapters change what gates read; merge the adapter into the weights before the retrofit"),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config names 'ExampleConnector': its connector moves blocks of tokens, and ours hold pages; leave it out",
    ),
    "kv_cache_dtype": (
        {"kv_cache_dtype": "fp8"},
        "--kv-cache-dtype is 'fp8'; pages hold the model's own dtype (auto) or int8 with a scale an entry (int8_per_token_head)",
    ),
    "option": ({"additional_config": {"dms": {"evict_bais": 1}}}, "dms has no option 'evict_bais' (did you mean 'evict_bias'?)"),
    "kv_dtype": ({"additional_config": {"dms": {"kv_dtype": "int3"}}}, "kv_dtype is 'int3' (did you mean 'int8'?); pages hold"),
    "two dtypes": (
        {"kv_cache_dtype": "int8_per_token_head", "additional_config": {"dms": {"kv_dtype": "int4"}}},
        "--kv-cache-dtype is 'int8_per_token_head' and dms.kv_dtype 'int4'; give one of them",
    ),
    "page size": ({"additional_config": {"dms": {"page_size": 8}}}, "dms.page_size is 8; a page holds 16, 32 or 64 entries"),
}
OTHER_FOLDERS = {
    "alignment": "gates of several windows with alignment 'next' are not served; retrofit with dms.alignment: own or one window",
    "weights": "trained on",
    "dense": "has no gates (gates.safetensors is missing); name a folder that `dms retrofit` wrote",
}


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    own = {"model": str(folders("one")), "dtype": "float32", "max_model_len": 512}
    weights = with_other_weights(folders("one"), tmp_path_factory.mktemp("weights") / "model")
    asks = {name: own | arguments for name, (arguments, _) in REFUSED.items()} | {
        "plain": own | {"dtype": "auto", "additional_config": {"dms": {"evict_bias": 0.5}, "other": 1}},
        "no prefixes": own | {"enable_prefix_caching": False, "kv_cache_dtype": "int8_per_token_head"},
        "alignment": own | {"model": str(make_folder(tmp_path_factory.mktemp("next"), (8, 24), alignment="next"))},
        "weights": own | {"model": str(weights)},
        "dense": own | {"model": str(ROOT / "recipes/tiny/model"), "hf_overrides": {"architectures": ["DMSForCausalLM"]}},
    }
    return run_engine(tmp_path_factory.mktemp("configs"), asks, script=CONFIGS)


def test_folders_with_gates_are_recognised(answers):
    expected = {"architecture": "DMSForCausalLM", "connector": "DMSConnector", "prefix_caching": False}
    options = {"evict_bias": 0.5, "page_size": 16, "pages_per_voucher": 4, "prefix_every": 256, "kv_dtype": None, "loops": False}
    assert answers["plain"] == expected | {"dms": options, "dtype": answers["plain"]["dtype"]}
    assert answers["no prefixes"]["dms"] == options | {"evict_bias": 0.0, "prefix_every": 0}


@pytest.mark.parametrize("name", [*REFUSED, *OTHER_FOLDERS])
def test_what_does_not_work_is_refused(name, answers):
    said = REFUSED[name][1] if name in REFUSED else OTHER_FOLDERS[name]
    assert said in answers[name].get("error", f"nothing, but {answers[name]}")


def test_a_pool_too_small_for_one_request_is_refused(folders, tmp_path):
    """It would preempt itself for ever."""
    folder = folders("one")
    engine = {"model": str(folder), "dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": dense_bytes(folder, 700)}
    said = fail_to_start(tmp_path, {"engine": engine, "acts": []})
    found = re.search(r"one request of max_model_len 1024 may need \d+, where its gates evict nothing; set kv_cache_memory_bytes", said)
    assert found, said[-4000:]
