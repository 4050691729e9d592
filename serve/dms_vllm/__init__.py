"""The vLLM plugin that serves models with gates: `dms serve FOLDER`, or `vllm serve FOLDER`.

vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`.
"""

ARCHITECTURE = "DMSForCausalLM"
# The operator that attention over pages is (`dms_vllm.model`).
ATTEND = "dms_vllm::attend"


def register() -> None:
    """Make vLLM know folders with gates, their model class, its configuration, and the connector."""
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from dms_vllm import configuration

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        # Called before in this process.
        return
    ModelRegistry.register_model(ARCHITECTURE, f"dms_vllm.model:{ARCHITECTURE}")
    KVConnectorFactory.register_connector("DMSConnector", "dms_vllm.connector", "DMSConnector")
    MODELS_CONFIG_MAP[ARCHITECTURE] = configuration.DMSConfiguration
    configuration.recognise_folders()
