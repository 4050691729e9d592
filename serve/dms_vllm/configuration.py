"""What vLLM is told while it completes its configuration, so that `vllm serve FOLDER` needs no option of ours, and what is refused by name."""

from typing import Any

from vllm.config import KVTransferConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dms_vllm.settings import KV_DTYPES, Options, Served

logger = init_logger(__name__)


class DMSConfiguration(VerifyAndUpdateConfig):
    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Raises ValueError for what does not work with gates, before anything is loaded."""
        model = vllm_config.model_config
        options, served = Options.of(vllm_config), Served.of(model.model, model.revision)
        served.check_weights()
        refuse(vllm_config, options, served)
        # Blocks are vouchers for pages, and hold no tokens that another request could have. What requests share is `dms.prefix_every`'s.
        vllm_config.cache_config.enable_prefix_caching = False
        vllm_config.kv_transfer_config = KVTransferConfig(kv_connector="DMSConnector", kv_role="kv_both")


def refuse(vllm_config: Any, options: Options, served: Served) -> None:
    """Raises ValueError for what does not work with gates."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if served.config.alignment == "next":
        raise ValueError(
            f"{served.folder}: gates with alignment 'next' decide for a token when the one after it comes, which the server does not do; "
            "retrofit with dms.alignment: own"
        )
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative decoding does not go with evicting gates: rejected tokens' evictions can't be taken back; leave it out"
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}, and the pages of all layers are in one pool; use tensor_parallel_size"
        )
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        raise ValueError(
            "decode_context_parallel_size divides each request's entries, and gates evict them by head; use tensor_parallel_size"
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "LoRA adapters change what gates read; merge the adapter into the weights before the retrofit, and leave --enable-lora out"
        )
    if vllm_config.kv_transfer_config is not None and vllm_config.kv_transfer_config.kv_connector != "DMSConnector":
        raise ValueError(
            f"--kv-transfer-config names {vllm_config.kv_transfer_config.kv_connector!r}: its connector moves blocks of tokens, and ours hold "
            "pages; leave it out"
        )
    if cache.cache_dtype not in KV_DTYPES:
        raise ValueError(
            f"--kv-cache-dtype is {cache.cache_dtype!r}; pages hold the model's own dtype (auto) or int8 with a scale an entry (int8_per_token_head)"
        )
    if cache.user_specified_block_size:
        logger.warning("--block-size has no effect with gates: a page holds %d entries (dms.page_size)", options.page_size)
