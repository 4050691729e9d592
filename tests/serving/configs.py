"""What vLLM says of its arguments, without starting an engine: `configs.py ASKS.json ANSWERS.json`. Not a test; test_refusals.py starts it.

ASKS: {name: arguments of vllm.EngineArgs}. ANSWERS: {name: {"error": its text}, or what was made of them}.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    asks, answers = map(Path, sys.argv[1:])

    from vllm import EngineArgs

    found = {}
    for name, arguments in json.loads(asks.read_text()).items():
        try:
            config = EngineArgs(**arguments).create_engine_config()
        except ValueError as error:
            found[name] = {"error": str(error)}
            continue
        found[name] = {
            "architecture": config.model_config.architecture,
            "dms": config.additional_config["dms"],
            "connector": config.kv_transfer_config.kv_connector,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "dtype": str(config.model_config.dtype),
        }
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
