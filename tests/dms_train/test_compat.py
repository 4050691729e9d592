"""What training assumes of accelerate, DeepSpeed, peft, PyYAML, transformers and wandb, held against what is installed.

`test_NAME` holds the assumption of the touch `compat.NAME`; tests/helpers/training_breaks.py breaks it on purpose.
"""

import contextlib
import copy
import inspect
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from dms_train import compat
from torch import nn
from training_breaks import BREAKS, TIMEOUT, make_small, zero_config

from dms.training.sharding import gathered, is_sharded, num_elements, resident_bytes
from dms.upstream import UpstreamChanged

UPSTREAM = Path(__file__).parents[2] / "docs" / "upstream.md"


@pytest.fixture(scope="module")
def group():
    """A process group of one, as DeepSpeed makes it; afterwards all is as it was."""
    deepspeed = pytest.importorskip("deepspeed")
    from accelerate.state import AcceleratorState

    # What an earlier test left would be taken for this group's.
    AcceleratorState._reset_state(reset_partial_state=True)
    before = dict(os.environ)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed.init_distributed(dist_backend="gloo", timeout=TIMEOUT, auto_mpi_discovery=False)
    compat.set_world_group(TIMEOUT)
    yield
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def make_engine(group):
    """make_engine(stage) -> (accelerator, engine, ZeRO's optimizer) of a small module and torch's AdamW."""
    from accelerate.state import AcceleratorState

    made = {}

    def make(stage: int):
        if stage not in made:
            AcceleratorState._reset_state()
            torch.manual_seed(stage)
            module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
            optimizer = torch.optim.AdamW([{"params": list(module.parameters()), "peak_lr": 1e-2}], lr=1e-2)
            accelerator = compat.deepspeed_accelerator(zero_config(stage), "gloo")
            made[stage] = accelerator, *compat.prepare_engine(accelerator, module, optimizer)
        return made[stage]

    return make


def take_step(engine: nn.Module, seed: int) -> None:
    engine.backward(engine(torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))).square().sum())
    engine.step()


def weights_of(engine: nn.Module) -> torch.Tensor:
    with gathered(engine.module.parameters()):
        return torch.cat([parameter.detach().flatten().clone() for parameter in engine.module.parameters()])


def test_set_world_group(make_engine):
    from deepspeed.utils import groups

    _, engine, _ = make_engine(2)
    assert engine.data_parallel_group is groups._WORLD_GROUP
    assert groups._WORLD_GROUP._get_backend(torch.device("cpu")).options._timeout == TIMEOUT


def test_deepspeed_accelerator(make_engine):
    accelerator, _, _ = make_engine(2)
    # Without a name accelerate has no backend on a CPU, and then one process whatever the group says.
    assert accelerator.state.backend == "gloo" and accelerator.distributed_type == "DEEPSPEED"
    assert (accelerator.num_processes, accelerator.process_index) == (1, 0)


@pytest.mark.parametrize("stage", [2, 3])
def test_prepare_engine(make_engine, stage):
    _, engine, optimizer = make_engine(stage)
    assert engine.zero_optimization_stage() == stage and type(optimizer.optimizer) is torch.optim.AdamW
    (parameter_group,) = optimizer.param_groups
    # What is set on the groups is what the next step goes by.
    before, parameter_group["lr"] = weights_of(engine), 0.0
    take_step(engine, 0)
    same = torch.equal(weights_of(engine), before)
    parameter_group["lr"] = parameter_group["peak_lr"]
    take_step(engine, 0)
    assert same and not torch.equal(weights_of(engine), before)


def test_quiet_deepspeed(group):
    import logging

    from deepspeed.utils import log_dist, logger

    level, seen = logger.level, []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.INFO)
        log_dist("before", ranks=[0])
        compat.quiet_deepspeed()
        log_dist("after", ranks=[0])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert any("before" in line for line in seen) and not any("after" in line for line in seen)


def cloned(tree):
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: cloned(value) for key, value in tree.items()}
    return [cloned(value) for value in tree] if isinstance(tree, list | tuple) else tree


def plain(tree):
    """A state with its tensors as numbers, to be compared."""
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else repr(tree)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_state(make_engine, stage):
    _, engine, optimizer = make_engine(stage)
    take_step(engine, 1)
    first, rest = cloned(compat.zero_state(optimizer, stage)), plain(optimizer.state_dict())
    take_step(engine, 2)
    second = compat.zero_state(optimizer, stage)
    assert first.keys() == second.keys() and all(plain(first[key]) != plain(second[key]) for key in first)
    then = plain(optimizer.state_dict())
    assert [key for key in then if key not in first and not _is_address(then[key]) and then[key] != rest[key]] == []
    # The float32 weights that the next step begins from.
    held = torch.cat([tensor.flatten() for tensor in list(second.values())[1]])
    assert torch.equal(held[: len(weights_of(engine))].sort().values, weights_of(engine).sort().values)


def _is_address(value) -> bool:
    return re.search(r" at 0x[0-9a-f]+|_hp_mapping", str(value)) is not None


@pytest.mark.parametrize("stage", [2, 3])
def test_load_zero_state(make_engine, stage):
    _, engine, optimizer = make_engine(stage)
    take_step(engine, 3)
    saved, before = cloned(compat.zero_state(optimizer, stage)), weights_of(engine)
    courses = []
    for _ in range(2):
        for seed in (4, 5):
            take_step(engine, seed)
        courses.append(weights_of(engine))
        compat.load_zero_state(optimizer, stage, saved)
        if stage == 2:
            # Weights that are not divided are the module's own, and put back by whoever saved them.
            nn.utils.vector_to_parameters(before, engine.module.parameters())
    assert torch.equal(courses[0], courses[1]) and not torch.equal(courses[0], before)


def test_replay_adam(group):
    if not compat.op_builder("CPUAdam").is_compatible(verbose=False):
        pytest.skip("DeepSpeed's Adam cannot be built here")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    def course(first: int, replays: bool) -> torch.Tensor:
        """60 steps; after `first` of them a new optimizer goes on from the old one's state."""
        parameter = nn.Parameter(torch.linspace(-1, 1, 4096))
        generator, optimizer = torch.Generator().manual_seed(0), DeepSpeedCPUAdam([parameter], lr=1e-2)
        for step in range(60):
            if step == first:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = DeepSpeedCPUAdam([parameter], lr=1e-2)
                optimizer.load_state_dict(state)
                if replays:
                    compat.replay_adam(SimpleNamespace(optimizer=optimizer), step)
            parameter.grad = torch.randn(4096, generator=generator)
            optimizer.step()
        return parameter.detach()

    whole = course(-1, False)
    assert torch.equal(course(50, True), whole)
    # Else there would be nothing to replay.
    assert not torch.equal(course(50, False), whole)


def test_op_builder(group):
    for name in ("CPUAdam", "AsyncIO"):
        assert compat.op_builder(name).is_compatible(verbose=False) in (True, False)


def test_build_locks(group, monkeypatch, tmp_path):
    import inspect

    from torch.utils import cpp_extension

    builder = compat.op_builder("CPUAdam")
    for variable in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert compat.build_locks(builder) == []
        # Where torch itself would build it, in a file of the name that it locks by.
        lock = Path(cpp_extension._get_build_directory(builder.name, verbose=False)) / "lock"
        lock.touch()
        assert [found.resolve() for found in compat.build_locks(builder)] == [lock.resolve()]
    assert "os.path.join(build_directory, 'lock')" in inspect.getsource(cpp_extension._jit_compile)
    assert "name=self.name" in inspect.getsource(type(builder).jit_load)


def test_keep_from_broadcast():
    from torch.nn.parallel import DistributedDataParallel

    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compat.keep_from_broadcast(module, ["0.weight"])
    # What its constructor reads.
    assert module._ddp_params_and_buffers_to_ignore == ["0.weight"]
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel.__init__)


def test_forget_quantization():
    from transformers.quantizers import HfQuantizer

    class Quantizer(HfQuantizer):
        is_trainable = True

        def is_serializable(self):
            return True

    model = make_small("llama")
    model.hf_quantizer, model.quantization_method = Quantizer(SimpleNamespace()), "any"
    model.config.quantization_config = {"quant_method": "any"}
    compat.forget_quantization(model)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config") and not model.is_quantized


def test_sharded_models(group, tiny_folder):
    from transformers import AutoModelForCausalLM

    with compat.sharded_models(zero_config(3)):
        divided = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert all(parameter.numel() == 0 and parameter.ds_numel > 0 for parameter in divided.parameters())
    whole = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert all(parameter.numel() > 0 for parameter in whole.parameters())


def test_is_sharded(make_engine):
    for stage, divided in ((2, False), (3, True)):
        module = make_engine(stage)[1].module
        assert all(is_sharded(parameter) == divided for parameter in module.parameters())
        assert sum(map(num_elements, module.parameters())) == 8 * 16 + 16 + 16 * 4 + 4
        # Of one process, what lies here is all of it.
        assert resident_bytes(module) == 4 * (8 * 16 + 16 + 16 * 4 + 4)


DROPPING = {
    "llama": {"attention_dropout": 0.3},
    "starcoder2": {"attention_dropout": 0.0, "residual_dropout": 0.3, "embedding_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("family", DROPPING)
def test_switch_off_dropout(family):
    model = make_small(family, **DROPPING[family]).train()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits), "nothing is dropped, so that nothing is shown"
        compat.switch_off_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.fixture
def adapted():
    """A small Llama with LoRA whose products are not zero."""
    peft = pytest.importorskip("peft")
    model = make_small("llama")
    compat.add_lora(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for _, layer in compat.lora_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight)
    return model


def test_add_lora(adapted):
    new = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    # Two matrices each of two projections of two layers; the rest is a model without them, of the same seed.
    assert len(new) == 8
    bare = {name.replace(".base_layer.", "."): p for name, p in adapted.named_parameters() if name not in new}
    assert bare.keys() == (fresh := dict(make_small("llama").named_parameters())).keys()
    assert all(torch.equal(bare[name], fresh[name]) for name in fresh)


def test_lora_layers(adapted):
    layers = dict(compat.lora_layers(adapted))
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"} and len(layers) == 4
    x = torch.randn(3, 32)
    for layer in layers.values():
        expected = layer(x)
        layer.merge()
        assert type(layer.get_base_layer()) is nn.Linear
        torch.testing.assert_close(layer.get_base_layer()(x), expected)
    assert list(compat.lora_layers(make_small("llama"))) == []


def test_lora_product(adapted):
    for _, layer in compat.lora_layers(adapted):
        expected = layer.get_base_layer().weight + compat.lora_product(layer)
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight, expected)


def test_switch_lora(adapted):
    ids = torch.arange(12)[None]
    layers, trains = [layer for _, layer in compat.lora_layers(adapted)], [p.requires_grad for p in adapted.parameters()]
    for layer in layers:
        compat.switch_lora(layer, False)
    off = adapted(ids).logits
    assert torch.equal(off, make_small("llama")(ids).logits)
    assert [p.requires_grad for p in adapted.parameters()] == trains and any(trains)
    for layer in layers:
        compat.switch_lora(layer, True)
    assert not torch.equal(adapted(ids).logits, off)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """(folder, a run that goes on in it offline, the file that an earlier process left of it)."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")

    def start():
        settings = {"silent": True, "console": "off", **compat.prompt_flush()}
        return wandb.init(id="abcd1234", dir=str(folder), mode="offline", reinit="create_new", resume="allow", settings=settings)

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
            patch.delenv(name)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        run = start()
        for step in range(1, 4):
            run.log({"x": step}, step=step)
        run.finish()
        (earlier,) = folder.glob("wandb/offline-run-*/*.wandb")
        # A part's folder is named by its second.
        time.sleep(1.05 - time.time() % 1)
        run = start()
        yield folder, run, earlier
        run.finish()
        wandb.teardown()


def test_prompt_flush(tracked):
    _, run, earlier = tracked
    run.log({"x": 7}, step=7)
    run.log({"x": 8}, step=8)
    (path,) = Path(run.dir).parent.glob("*.wandb")
    # Less than the 15 seconds that wandb would wait by itself.
    deadline = time.monotonic() + 10
    while not path.is_file() or compat.read_part(path)[0] < 7:
        assert time.monotonic() < deadline, "what was logged did not reach the file"
        time.sleep(0.1)


def test_earlier_parts(tracked):
    folder, run, earlier = tracked
    assert compat.earlier_parts(run, folder) == [earlier]


def test_read_part(tracked, tmp_path):
    _, _, earlier = tracked
    data, path = earlier.read_bytes(), tmp_path / "cut.wandb"
    assert compat.read_part(earlier) == (3, len(data), True)
    for size in (len(data) - 1, 7, 3, 0):
        path.write_bytes(data[:size])
        last, whole, begun = compat.read_part(path)
        assert whole < len(data) and whole <= size and begun == (size > 7) and (last == 3) == (size > 7)


def test_replace_scalars():
    class Loader(yaml.SafeLoader):
        pass

    text = "[no, 1, 1e-5, 2020-01-01]"
    before = yaml.safe_load(text)
    compat.replace_scalars(
        Loader,
        {"tag:yaml.org,2002:bool": (re.compile("^true$"), "t"), "tag:yaml.org,2002:float": (re.compile(r"^\d+(e-\d+)?$"), "0123456789")},
    )
    assert yaml.load(text, Loader=Loader) == ["no", 1, 1e-5, before[3]] and before[:3] == [False, 1, "1e-5"]
    assert yaml.safe_load(text) == before


TOUCHES = ["is_sharded", *(name for name in compat.__all__ if name != "UpstreamChanged")]


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_touch_is_named(name, monkeypatch, request):
    touch = max((touch for touch in TOUCHES if name.startswith(touch)), key=len)
    with contextlib.closing(SimpleNamespace(close=monkeypatch.undo)), pytest.raises(UpstreamChanged) as error:
        BREAKS[name](monkeypatch, request.getfixturevalue)
    packages = re.search(rf"^\| `{touch}` \| (.+?) \|", UPSTREAM.read_text(), re.MULTILINE)[1].replace(", ", "|")
    assert re.match(
        rf"({packages}) \S+: (compat|sharding)\.{touch} needs .+, which is not there any more; .*see docs/upstream\.md$", str(error.value)
    )


def test_every_touch_is_held_broken_and_listed():
    sections = re.split(r"^## ", UPSTREAM.read_text(), flags=re.MULTILINE)
    ours = [section for section in sections if section.startswith(("`dms/training/sharding.py`", "`train/dms_train/compat.py`"))]
    assert re.findall(r"^\| `(\w+)` \|", "".join(ours), re.MULTILINE) == TOUCHES
    for touch in TOUCHES:
        assert f"test_{touch}" in globals() and touch in BREAKS
        said = (is_sharded if touch == "is_sharded" else getattr(compat, touch)).__doc__
        assert re.search(r"\n\n    Assumes: ", said), touch
