"""All uses that training makes of internals of accelerate, DeepSpeed, peft, PyYAML, transformers and wandb.

One function each. Its docstring says what it does and what it assumes; where the assumption fails it raises UpstreamChanged with the
function's name. docs/upstream.md lists them, and tests/dms_train/test_compat.py holds each against the installed versions.
"""

import fnmatch
import importlib
import inspect
import logging
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dms.upstream import UpstreamChanged, changed

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel


def _changed(touch: str, package: str, needs: str) -> UpstreamChanged:
    return changed(f"compat.{touch}", package, needs)


# accelerate and DeepSpeed.


def set_world_group(timeout: timedelta) -> None:
    """Make DeepSpeed's own group of all processes, which it would make itself with torch's default timeout instead of ours.

    Assumes: deepspeed.utils.groups keeps it in _WORLD_GROUP, None until then, and hands it out by _clone_world_group.
    """
    import torch
    from deepspeed.utils import groups

    needs = "deepspeed.utils.groups._WORLD_GROUP, handed out by _clone_world_group"
    if not (hasattr(groups, "_WORLD_GROUP") and hasattr(groups, "_clone_world_group")):
        raise _changed("set_world_group", "deepspeed", needs)
    made = torch.distributed.new_group(list(range(torch.distributed.get_world_size())), timeout=timeout)
    groups._WORLD_GROUP = made
    if groups._clone_world_group() is not made:
        raise _changed("set_world_group", "deepspeed", needs)


def deepspeed_accelerator(config: dict[str, Any], backend: str) -> "Accelerator":
    """An Accelerator for DeepSpeed by a configuration, on the process group that exists.

    Assumes: where the backend is named it counts the group's processes; without it, on CPUs, it believes in one.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(backend=backend)])
    if accelerator.num_processes != torch.distributed.get_world_size():
        raise _changed(
            "deepspeed_accelerator", "accelerate", "an Accelerator that counts the processes of the group that InitProcessGroupKwargs names"
        )
    return accelerator


def prepare_engine(
    accelerator: "Accelerator", module: "nn.Module", optimizer: "torch.optim.Optimizer"
) -> tuple["nn.Module", "torch.optim.Optimizer"]:
    """DeepSpeed's engine of a module, and ZeRO's optimizer around ours.

    Assumes: Accelerator.prepare returns the engine itself and no wrapper, and its `optimizer` has our groups with their own keys.
    """
    from deepspeed import DeepSpeedEngine

    ours = [set(group) for group in optimizer.param_groups]
    engine, _ = accelerator.prepare(module, optimizer)
    if not isinstance(engine, DeepSpeedEngine):
        raise _changed("prepare_engine", "accelerate", "a DeepSpeedEngine from Accelerator.prepare")
    groups = getattr(engine.optimizer, "param_groups", [])
    if len(groups) != len(ours) or not all(keys <= set(group) for keys, group in zip(ours, groups, strict=True)):
        raise _changed("prepare_engine", "deepspeed", "DeepSpeedEngine.optimizer.param_groups with the keys of the groups given")
    return engine, engine.optimizer


def quiet_deepspeed() -> None:
    """Let DeepSpeed log warnings only.

    Assumes: it logs by deepspeed.utils.logger.
    """
    from deepspeed import utils

    if not isinstance(getattr(utils, "logger", None), logging.Logger):
        raise _changed("quiet_deepspeed", "deepspeed", "the logging.Logger deepspeed.utils.logger")
    utils.logger.setLevel(logging.WARNING)


# The parts of ZeRO's optimizer state that change as a run goes on, by stage.
_ZERO_STATE = {
    2: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    3: ("optimizer_state_dict", "fp32_flat_groups"),
}


def zero_state(optimizer: "torch.optim.Optimizer", stage: int) -> dict[str, Any]:
    """Of the state of ZeRO's optimizer, this process's, the parts that change as a run goes on.

    Assumes: state_dict() holds them under the names of _ZERO_STATE: the state of the optimizer inside, and the weights in float32.
    """
    state = optimizer.state_dict()
    return {key: state[key] for key in _known_parts("zero_state", state, stage)}


def load_zero_state(optimizer: Any, stage: int, saved: dict[str, Any]) -> None:
    """Restore what `zero_state` gave; what does not change during a run is taken from the current optimizer.

    Assumes: load_state_dict takes a list of all processes' states and reads its own, with load_optimizer_states and
    load_from_fp32_weights.
    """
    import torch

    state = optimizer.state_dict()
    _known_parts("load_zero_state", state, stage)
    expected = ("state_dict_list", "load_optimizer_states", "load_from_fp32_weights")
    if tuple(inspect.signature(optimizer.load_state_dict).parameters)[:3] != expected:
        raise _changed("load_zero_state", "deepspeed", f"{type(optimizer).__name__}.load_state_dict({', '.join(expected)}, ...)")
    states = [state | saved] * torch.distributed.get_world_size()
    optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=True)


def _known_parts(touch: str, state: dict[str, Any], stage: int) -> tuple[str, ...]:
    if missing := [key for key in _ZERO_STATE[stage] if key not in state]:
        raise _changed(touch, "deepspeed", f"{' and '.join(map(repr, missing))} in the state of the optimizer of ZeRO stage {stage}")
    return _ZERO_STATE[stage]


def replay_adam(optimizer: "torch.optim.Optimizer", steps: int) -> None:
    """Bring the bias correction of DeepSpeedCPUAdam inside ZeRO's optimizer to where `steps` steps leave it; nothing for another.

    It multiplies powers of beta up step by step, outside of its state; a new one would take them from pow, whose last bit differs.

    Assumes: the optimizer inside is `optimizer`; of it ds_opt_adam.adam_update(opt_id, step, lr, beta1, beta2, eps, weight_decay,
    bias_correction, weights, gradients, exp_avg, exp_avg_sq) takes the powers along for the next step.
    """
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    inside = getattr(optimizer, "optimizer", None)
    if inside is None:
        raise _changed("replay_adam", "deepspeed", f"{type(optimizer).__name__}.optimizer")
    if not isinstance(inside, DeepSpeedCPUAdam):
        return
    update, number = getattr(getattr(inside, "ds_opt_adam", None), "adam_update", None), getattr(inside, "opt_id", None)
    if update is None or number is None:
        raise _changed("replay_adam", "deepspeed", "DeepSpeedCPUAdam.ds_opt_adam.adam_update and opt_id")
    group = inside.param_groups[0]
    for step in range(1, steps + 1):
        scratch = [torch.zeros(1) for _ in range(4)]
        try:
            update(number, step, 0.0, *group["betas"], group["eps"], 0.0, True, *scratch)
        except TypeError as error:
            raise _changed("replay_adam", "deepspeed", "adam_update with the arguments that it is called with") from error


def op_builder(name: str) -> Any:
    """What builds or loads one of DeepSpeed's compiled operators, "CPUAdam" or "AsyncIO".

    Assumes: deepspeed.ops.op_builder.NAMEBuilder has is_compatible(verbose) and load(verbose).
    """
    from deepspeed.ops import op_builder as builders

    found: Any = getattr(builders, f"{name}Builder", None)
    if not all("verbose" in _parameters(getattr(found, method, None)) for method in ("is_compatible", "load")):
        raise _changed("op_builder", "deepspeed", f"deepspeed.ops.op_builder.{name}Builder with is_compatible(verbose) and load(verbose)")
    return found()


def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters) if callable(function) else ()


def build_locks(builder: Any) -> list[Path]:
    """Lock files of operators that are being built: PyTorch waits for them in silence, and a process that is killed leaves its own.

    Assumes: an operator is built in ROOT/NAME or ROOT/PLATFORM/NAME with a file "lock"; ROOT is TORCH_EXTENSIONS_DIR or
    torch.utils.cpp_extension.get_default_build_root(), NAME is the builder's.
    """
    from torch.utils import cpp_extension

    name, default = getattr(builder, "name", None), getattr(cpp_extension, "get_default_build_root", None)
    if name is None:
        raise _changed("build_locks", "deepspeed", f"{type(builder).__name__}.name")
    if default is None:
        raise _changed("build_locks", "torch", "torch.utils.cpp_extension.get_default_build_root")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default())
    return [*root.glob(f"*/{name}/lock"), *root.glob(f"{name}/lock")]


def keep_from_broadcast(module: "nn.Module", names: Iterable[str]) -> None:
    """Leave parameters and buffers out of what data parallelism sends from the first process to the others at its start.

    Assumes: DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names), by names within the module.
    """
    from torch.nn.parallel import DistributedDataParallel

    ignore = getattr(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model", None)
    if ignore is None:
        raise _changed("keep_from_broadcast", "torch", "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model")
    ignore(module, list(names))


# transformers.


def forget_quantization(model: Any) -> None:
    """Make an ordinary model of one whose packed layers were replaced by ordinary ones.

    Assumes: the quantiser in hf_quantizer takes what it left on the model away again in remove_quantization_config(model).
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not hasattr(quantizer, "remove_quantization_config"):
        raise _changed("forget_quantization", "transformers", "PreTrainedModel.hf_quantizer.remove_quantization_config(model)")
    quantizer.remove_quantization_config(model)
    if hasattr(model, "hf_quantizer") or hasattr(model.config, "quantization_config"):
        raise _changed("forget_quantization", "transformers", "remove_quantization_config that removes the model's hf_quantizer")
    # Weights are no longer what the files' conversions were for.
    model._weight_conversions = None


@contextmanager
def sharded_models(config: dict[str, Any]) -> Iterator[None]:
    """Within it transformers builds and loads models straight into ZeRO-3's shards. config: DeepSpeed's.

    Assumes: from_pretrained goes by an HfDeepSpeedConfig for as long as that lives, and not a moment longer.
    """
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig(config)
    if not is_deepspeed_zero3_enabled():
        raise _changed("sharded_models", "transformers", "an HfDeepSpeedConfig that switches ZeRO-3's loading on while it lives")
    try:
        yield
    finally:
        del alive
    if is_deepspeed_zero3_enabled():
        raise _changed("sharded_models", "transformers", "an HfDeepSpeedConfig with which ZeRO-3's loading ends")


def switch_off_dropout(model: "PreTrainedModel") -> None:
    """Switch off all dropout of a model that trains.

    Assumes: it is in nn.Dropout modules, and in numbers that modules hold under names with "drop", such as attention_dropout.
    """
    from torch import nn

    found = False
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
                found = True
    asked = getattr(model.config.get_text_config(), "attention_dropout", None)
    if asked and not found:
        raise _changed(
            "switch_off_dropout", "transformers", f"a module of {type(model).__name__} that holds its attention_dropout of {asked}"
        )


# peft.


def add_lora(model: "nn.Module", config: Any) -> None:
    """Put peft's LoRA layers into a model, in place. config: a LoraConfig.

    Assumes: the parameters that come with them have ".lora_" in their names, and `lora_layers` finds those layers.

    Raises:
        ValueError: target modules that the model does not have (peft's message).
    """
    from peft import inject_adapter_in_model

    before = {id(parameter) for parameter in model.parameters()}
    inject_adapter_in_model(config, model)
    new = [name for name, parameter in model.named_parameters() if id(parameter) not in before]
    within = tuple(f"{name}.lora_" for name, _ in lora_layers(model))
    if not (new and within and all(name.startswith(within) for name in new)):
        raise _changed("add_lora", "peft", "LoRA layers whose parameters are named LAYER.lora_..., and which have lora_A and lora_B")


def lora_layers(model: "nn.Module") -> Iterator[tuple[str, Any]]:
    """The modules that hold adapters, with their names.

    Assumes: they, and no others, have modules `lora_A` and `lora_B`, get_base_layer() for what they adapt, and merge().
    """
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            if missing := [part for part in ("lora_B", "merge", "get_base_layer") if not hasattr(module, part)]:
                raise _changed("lora_layers", "peft", f"{' and '.join(missing)} of {type(module).__name__}")
            yield name, module


def lora_product(layer: Any) -> "torch.Tensor":
    """What a LoRA layer's adapter adds to the weight that it adapts.

    Assumes: get_delta_weight(adapter) gives it; the only adapter is named as the only key of lora_A.
    """
    names = list(layer.lora_A)
    if len(names) != 1 or not hasattr(layer, "get_delta_weight"):
        raise _changed("lora_product", "peft", f"get_delta_weight of {type(layer).__name__}, with one adapter")
    return layer.get_delta_weight(names[0])


def switch_lora(layer: Any, on: bool) -> None:
    """Let a LoRA layer add its product or not. peft's own switch would also stop the adapters' gradients.

    Assumes: its forward goes by `disable_adapters`, which reads `_disable_adapters`.
    """
    if not hasattr(layer, "_disable_adapters"):
        raise _changed("switch_lora", "peft", f"{type(layer).__name__}._disable_adapters")
    layer._disable_adapters = not on
    if getattr(layer, "disable_adapters", None) is not (not on):
        raise _changed("switch_lora", "peft", f"{type(layer).__name__}.disable_adapters that reads _disable_adapters")


# wandb.


def prompt_flush() -> dict[str, Any]:
    """Settings of wandb.init by which logged values reach the file each second: the rest is lost when the process is killed.

    Assumes: wandb.Settings has the experimental x_transaction_log_flush_interval, in seconds.
    """
    import wandb

    if "x_transaction_log_flush_interval" not in wandb.Settings.model_fields:
        raise _changed("prompt_flush", "wandb", "wandb.Settings.x_transaction_log_flush_interval")
    return {"x_transaction_log_flush_interval": 1.0}


def earlier_parts(run: Any, folder: Path) -> list[Path]:
    """The .wandb files that earlier processes of a run left in `folder`; of an online run those alone that were offline.

    Assumes: `folder`/wandb/[offline-]run-TIME-ID/*.wandb, and run.dir is a folder within the run's own.
    """
    own = Path(run.dir).parent
    if not fnmatch.fnmatch(own.name, f"{'offline-' if run.offline else ''}run-*-{run.id}*") and not run.disabled:
        raise _changed("earlier_parts", "wandb", f"a run's folder to be named [offline-]run-TIME-ID, and not {own.name}")
    kind = "*run" if run.offline else "offline-run"
    return [part for part in folder.glob(f"wandb/{kind}-*-{run.id}*/*.wandb") if part.parent != own]


_WANDB_HEADER = b":W&B\xe1\xbe\x00"


def read_part(path: Path) -> tuple[int, int, bool]:
    """Of a .wandb file, whole or cut short: the last step in it (0: none), the bytes up to the end of its last whole record, and
    whether a run began in it.

    Assumes: after _WANDB_HEADER, LevelDB's log of wandb.proto.wandb_internal_pb2.Record, with `run` and history.step.num.
    """
    # Classes that protobuf makes at import have no stubs.
    Record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, whole, record, begun, last = path.read_bytes(), 7, 0, b"", False, 0
    if not _WANDB_HEADER.startswith(data[:7]):
        raise _changed("read_part", "wandb", f"the header {_WANDB_HEADER!r} of .wandb files (found {data[:7]!r})")
    # Pieces with headers of 7 bytes, which blocks of 32 KiB do not divide. Piece 1 is a whole record, 4 ends one.
    while (start := at + (-at % 32768 if -at % 32768 < 7 else 0) + 7) <= len(data):
        length, piece = struct.unpack_from("<HB", data, start - 3)
        if piece not in (1, 2, 3, 4) or start + length > len(data):
            break
        at, record = start + length, record + data[start : start + length]
        if piece in (1, 4):
            entry, record, whole = Record.FromString(record), b"", at
            try:
                begun, last = begun or entry.HasField("run"), max(last, entry.history.step.num)
            except (AttributeError, ValueError) as error:
                raise _changed("read_part", "wandb", "wandb_internal_pb2.Record with run and history.step.num") from error
    return last, whole, begun


# PyYAML.


def replace_scalars(loader: type[yaml.SafeLoader], patterns: dict[str, tuple[re.Pattern, str]]) -> None:
    """Let a YAML loader of ours read other plain scalars as booleans and numbers than PyYAML's does. patterns: by tag, the scalars and their first
    letters.

    Assumes: yaml_implicit_resolvers, by first letter, lists (tag, pattern), the first that matches counts, and a class can have its own.
    """
    known = getattr(loader, "yaml_implicit_resolvers", None)
    if not isinstance(known, dict) or not set(patterns) <= {tag for resolvers in known.values() for tag, _ in resolvers}:
        raise _changed("replace_scalars", "PyYAML", f"SafeLoader.yaml_implicit_resolvers with {' and '.join(patterns)}")
    loader.yaml_implicit_resolvers = {
        letter: [resolver for resolver in resolvers if resolver[0] not in patterns] for letter, resolvers in known.items()
    }
    # At the end of each list: a whole number stays one where a pattern for fractions fits it too.
    for tag, (pattern, letters) in patterns.items():
        loader.add_implicit_resolver(tag, pattern, list(letters))


__all__ = ["UpstreamChanged"] + [
    name
    for name, value in list(globals().items())
    if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == __name__
]
