"""The vLLM plugin that serves models with gates: `dms serve FOLDER`, or `vllm serve FOLDER`.

vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`.
"""

ARCHITECTURE = "DMSForCausalLM"


def register() -> None:
    """Make vLLM know the model class, its configuration, the connector and the pool's spec."""
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from dms_vllm import accounting
    from dms_vllm.configuration import DMSConfiguration

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        # Called before in this process.
        return
    ModelRegistry.register_model(ARCHITECTURE, f"dms_vllm.model:{ARCHITECTURE}")
    KVConnectorFactory.register_connector("DMSConnector", "dms_vllm.connector", "DMSConnector")
    accounting.register()
    MODELS_CONFIG_MAP[ARCHITECTURE] = DMSConfiguration
