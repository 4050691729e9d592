"""By touch of `dms_train.compat` and `dms.training.sharding`: break what it stands on, and touch it.

`break_TOUCH` (or `break_TOUCH_...`, where there are several ways) takes a monkeypatch and `get`, which gives the fixtures of
tests/dms_train/test_compat.py by name.
"""

import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import yaml
from dms_train import compat
from torch import nn

from dms.training.sharding import is_sharded

TIMEOUT = timedelta(minutes=3)
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def zero_config(stage: int) -> dict:
    return {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


def make_small(family: str, **changes) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **changes}))


def break_set_world_group(patch, get):
    get("group")
    patch.delattr("deepspeed.utils.groups._WORLD_GROUP")
    compat.set_world_group(TIMEOUT)


def break_deepspeed_accelerator(patch, get):
    get("group")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    patch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 2))
    compat.deepspeed_accelerator(zero_config(2), "gloo")


def break_prepare_engine(patch, get):
    accelerator, engine, _ = get("make_engine")(2)
    patch.setattr(accelerator, "prepare", lambda *args: (nn.DataParallel(engine), None))
    compat.prepare_engine(accelerator, engine, SimpleNamespace(param_groups=[]))


def break_prepare_engine_groups(patch, get):
    accelerator, engine, _ = get("make_engine")(2)
    patch.setattr(accelerator, "prepare", lambda *args: (engine, None))
    compat.prepare_engine(accelerator, engine, SimpleNamespace(param_groups=[{"params": [], "own": 1}]))


def break_quiet_deepspeed(patch, get):
    get("group")
    patch.delattr("deepspeed.utils.logger")
    compat.quiet_deepspeed()


def break_zero_state(patch, get):
    _, _, optimizer = get("make_engine")(2)
    patch.setattr(optimizer, "state_dict", lambda: {"base_optimizer_state": {}})
    compat.zero_state(optimizer, 2)


def break_load_zero_state(patch, get):
    _, _, optimizer = get("make_engine")(3)
    saved = compat.zero_state(optimizer, 3)
    patch.setattr(optimizer, "load_state_dict", lambda state_dict, load_optimizer_states: None)
    compat.load_zero_state(optimizer, 3, saved)


def break_replay_adam(patch, get):
    _, _, optimizer = get("make_engine")(2)
    patch.delattr(optimizer, "optimizer")
    compat.replay_adam(optimizer, 3)


def break_replay_adam_operator(patch, get):
    get("group")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    adam = object.__new__(DeepSpeedCPUAdam)
    torch.optim.Optimizer.__init__(adam, [nn.Parameter(torch.zeros(1))], {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False})
    adam.opt_id, adam.ds_opt_adam = 0, SimpleNamespace(adam_update=lambda number, step: None, destroy_adam=lambda number: None)
    compat.replay_adam(SimpleNamespace(optimizer=adam), 3)


def break_op_builder(patch, get):
    get("group")
    patch.delattr("deepspeed.ops.op_builder.CPUAdamBuilder")
    compat.op_builder("CPUAdam")


def break_build_locks(patch, get):
    get("group")
    builder = compat.op_builder("CPUAdam")
    patch.delattr("torch.utils.cpp_extension.get_default_build_root")
    compat.build_locks(builder)


def break_sharded_models(patch, get):
    get("group")
    patch.setattr("transformers.integrations.HfDeepSpeedConfig", dict)
    with compat.sharded_models(zero_config(3)):
        pass


def break_sharded_models_afterwards(patch, get):
    get("group")
    from transformers.integrations import HfDeepSpeedConfig

    alive = []
    patch.setattr("transformers.integrations.HfDeepSpeedConfig", lambda config: alive.append(HfDeepSpeedConfig(config)))
    try:
        with compat.sharded_models(zero_config(3)):
            pass
    finally:
        alive.clear()


def break_is_sharded(patch, get):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.ds_id = parameter.ds_tensor = 0
    is_sharded(parameter)


def break_switch_off_dropout(patch, get):
    model = make_small("llama", attention_dropout=0.3)
    for layer in model.model.layers:
        patch.delattr(layer.self_attn, "attention_dropout")
    compat.switch_off_dropout(model)


def break_add_lora(patch, get):
    peft = pytest.importorskip("peft")
    inject = peft.inject_adapter_in_model

    def renaming(config, model):
        inject(config, model)
        for _, layer in list(compat.lora_layers(model)):
            layer.down, layer.up = layer._modules.pop("lora_A"), layer._modules.pop("lora_B")

    patch.setattr("peft.inject_adapter_in_model", renaming)
    compat.add_lora(make_small("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def break_lora_layers(patch, get):
    model = get("adapted")
    patch.delattr("peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer")
    list(compat.lora_layers(model))


def break_lora_product(patch, get):
    _, layer = next(compat.lora_layers(get("adapted")))
    layer.lora_A["other"] = layer.lora_A["default"]
    compat.lora_product(layer)


def break_keep_from_broadcast(patch, get):
    patch.delattr("torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model")
    compat.keep_from_broadcast(make_small("llama"), [])


def break_forget_quantization(patch, get):
    compat.forget_quantization(make_small("llama"))


def break_switch_lora(patch, get):
    _, layer = next(compat.lora_layers(get("adapted")))
    patch.setattr("peft.tuners.tuners_utils.BaseTunerLayer.disable_adapters", property(lambda self: False))
    compat.switch_lora(layer, False)


def break_switch_lora_flag(patch, get):
    _, layer = next(compat.lora_layers(get("adapted")))
    patch.delattr("peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters")
    patch.delattr(layer, "_disable_adapters")
    compat.switch_lora(layer, False)


def break_prompt_flush(patch, get):
    pytest.importorskip("wandb")
    patch.setattr("wandb.Settings", SimpleNamespace(model_fields={"silent": None}))
    compat.prompt_flush()


def break_earlier_parts(patch, get):
    folder, run, _ = get("tracked")
    patch.setattr(type(run), "dir", property(lambda self: str(folder / "wandb" / "20300101-abcd1234" / "files")))
    compat.earlier_parts(run, folder)


def break_read_part(patch, get):
    path = get("tmp_path") / "run.wandb"
    path.write_bytes(b"SQLite format 3\0")
    compat.read_part(path)


def break_read_part_record(patch, get):
    _, _, earlier = get("tracked")
    from google.protobuf.empty_pb2 import Empty

    patch.setattr("wandb.proto.wandb_internal_pb2.Record", Empty)
    compat.read_part(earlier)


def break_replace_scalars(patch, get):
    patch.delattr("yaml.resolver.BaseResolver.yaml_implicit_resolvers")
    patch.delattr("yaml.resolver.Resolver.yaml_implicit_resolvers")
    compat.replace_scalars(yaml.SafeLoader, {"tag:yaml.org,2002:bool": (re.compile("^true$"), "t")})


BREAKS = {name.removeprefix("break_"): value for name, value in list(globals().items()) if name.startswith("break_")}
