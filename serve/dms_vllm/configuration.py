"""What vLLM is told while it completes its configuration, so that `vllm serve FOLDER` needs no option of ours, and what is refused by name."""

import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import get_config_parser, register_config_parser

from dms_vllm import ARCHITECTURE, ATTEND

if TYPE_CHECKING:
    from dms_vllm.settings import Options, Served

logger = init_logger(__name__)


def recognise_folders() -> None:
    """Let vLLM take our model class for a configuration that has gates. What it names is the dense model's, for all others that read it."""
    own: Any = type(get_config_parser("hf"))

    class GatedFolders(own):
        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict, Any]:
            read, config = super().parse(*args, **kwargs)
            if getattr(config, "dms", None) is not None:
                config.architectures = [ARCHITECTURE]
            return read, config

    # It warns that there is one already.
    log = logging.getLogger(register_config_parser.__module__)
    log.disabled, before = True, log.disabled
    try:
        register_config_parser("hf")(GatedFolders)
    finally:
        log.disabled = before


class DMSConfiguration(VerifyAndUpdateConfig):
    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Raises ValueError for what does not work with gates, before anything is loaded."""
        # In processes that serve other models nothing of ours is imported.
        from vllm.config import KVTransferConfig

        from dms_vllm.settings import Options, Served

        model = vllm_config.model_config
        options, served = Options.of(vllm_config), Served.of(model.model, model.revision)
        served.check_weights()
        refuse(vllm_config, options, served)
        if not vllm_config.cache_config.enable_prefix_caching:
            options = replace(options, prefix_every=0)
        vllm_config.additional_config = {**(vllm_config.additional_config or {}), "dms": asdict(options)}
        # Its own would look for tokens in blocks, which are vouchers and hold none.
        vllm_config.cache_config.enable_prefix_caching = False
        divide_graphs(vllm_config.compilation_config)
        vllm_config.kv_transfer_config = KVTransferConfig(kv_connector="DMSConnector", kv_role="kv_both")


def divide_graphs(compilation: Any) -> None:
    """Have vLLM divide what it compiles at our attention, as at its own: a CUDA graph that held it would replay one step's page tables."""
    ops = compilation._attention_ops if compilation.splitting_ops is None else compilation.splitting_ops
    compilation.splitting_ops = [*ops, *(op for op in [ATTEND] if op not in ops)]


def refuse(vllm_config: Any, options: "Options", served: "Served") -> None:
    """Raises ValueError for what does not work with gates."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if served.config.alignment == "next" and len(served.config.windows) > 1:
        # A token without a decision may go to any window's pages, which vouchers do not foresee.
        raise ValueError(
            f"{served.folder}: gates of several windows with alignment 'next' are not served; retrofit with dms.alignment: own or one window"
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
    if vllm_config.model_config.enable_sleep_mode:
        raise ValueError(
            "--enable-sleep-mode gives the KV cache's memory up, and the workers' page tables would point at nothing; leave it out"
        )
    options.pages(cache.cache_dtype)
    if cache.user_specified_block_size:
        logger.warning("--block-size has no effect with gates: a page holds %d entries (dms.page_size)", options.page_size)
