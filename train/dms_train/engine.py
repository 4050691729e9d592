"""The training engine: plain data parallelism, or DeepSpeed's ZeRO with its configuration derived from the recipe.

Weights are held in the dtype that they were loaded in, and autocast is the model's own: DeepSpeed's bf16 switch would round the gates.
"""

import json
import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from rich.console import Console
from torch import nn

from dms.modes import state_of
from dms.requirements import missing
from dms.training.packed_attention import PackedAttention, check_sharing, local_rows, other_attention
from dms_train import compat
from dms_train.operators import build_operator
from dms_train.recipe import RetrofitRecipe
from dms_train.stopping import is_launched


def deepspeed_config(recipe: RetrofitRecipe, num_processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration; the recipe is the only source of it."""
    zero = recipe.zero
    section: dict[str, Any] = {"stage": zero.stage, "contiguous_gradients": True, "overlap_comm": torch.cuda.is_available()}
    if zero.offload_param == "nvme":
        # Whatever is read ahead or kept for its next use holds one of the swapper's few buffers; it gives up where they run out.
        section |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    for kind in ("optimizer", "param"):
        device = getattr(zero, f"offload_{kind}")
        if device != "none":
            offload = {"device": device, "pin_memory": torch.cuda.is_available()}
            section[f"offload_{kind}"] = {**offload, "nvme_path": zero.nvme_path} if device == "nvme" else offload
    return {
        # Processes that share sequences count in full here; gradients are sums, which we scale ourselves.
        "train_batch_size": recipe.batch_size * recipe.sequence_parallel,
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": num_micro_steps(recipe, num_processes),
        "gradient_clipping": recipe.optimizer.grad_clip,
        "zero_optimization": section,
        "zero_allow_untested_optimizer": True,
        # Without a compiler, torch's AdamW steps on the offloaded state.
        "zero_force_ds_cpu_optimizer": False,
        # Its own step lines would repeat ours.
        "steps_per_print": 2**31 - 1,
    }


def num_micro_steps(recipe: RetrofitRecipe, num_processes: int) -> int:
    """Forward and backward passes of each process in an optimizer step."""
    return recipe.batch_size * recipe.sequence_parallel // (recipe.micro_batch_size * num_processes)


def make_accelerator(recipe: RetrofitRecipe) -> Accelerator:
    """Join the other processes, as the launcher's environment names them.

    Raises:
        ValueError: a batch that these processes cannot share, or ZeRO without DeepSpeed.
    """
    has_gpu = torch.cuda.is_available()
    backend, timeout = "nccl" if has_gpu else "gloo", timedelta(minutes=recipe.timeout_minutes)
    if recipe.zero.stage == 0:
        # Named without a launcher, a backend would make accelerate wait for a group.
        handlers: list[Any] = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if is_launched() else []
        if recipe.warm_start is not None and recipe.trainable != "gates":
            # In its steps only the gates have gradients, and data parallelism would wait for the others'.
            handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
        accelerator = Accelerator(cpu=not has_gpu, mixed_precision="no", kwargs_handlers=handlers)
        check_batch(recipe, accelerator.num_processes)
        return accelerator
    try:
        import deepspeed
    except ImportError:
        raise ValueError(f"{missing(f'zero.stage {recipe.zero.stage}', 'deepspeed')}, or choose zero.stage=0") from None
    compat.quiet_deepspeed()
    _check_nvme(recipe)
    if "RANK" not in os.environ:
        # No launcher: a group of one.
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False)
    num_processes = torch.distributed.get_world_size()
    compat.set_world_group(timeout)
    check_batch(recipe, num_processes)
    return compat.deepspeed_accelerator(deepspeed_config(recipe, num_processes), backend)


def _check_nvme(recipe: RetrofitRecipe) -> None:
    """Raises ValueError where weights or optimizer state could not be offloaded to `nvme_path`."""
    if not recipe.zero.offloads_to_nvme:
        return
    assert recipe.zero.nvme_path is not None
    path = Path(recipe.zero.nvme_path).expanduser()
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"zero.nvme_path '{path}' is not a folder that can be written to; make it, or choose another")
    if not compat.op_builder("AsyncIO").is_compatible(verbose=False):
        raise ValueError("offloading to nvme needs libaio's headers (sudo apt-get install libaio-dev), g++ and ninja; or offload to cpu")


def check_batch(recipe: RetrofitRecipe, num_processes: int) -> None:
    """Raises ValueError for a batch that this many processes cannot share."""
    shared = recipe.sequence_parallel
    if num_processes % shared:
        raise ValueError(
            f"sequence_parallel is {shared}, and there are {num_processes} processes, which it does not divide; change one of them"
        )
    if recipe.batch_size * shared % (recipe.micro_batch_size * num_processes):
        sharing = (
            f" / sequence_parallel = {recipe.micro_batch_size} x {num_processes} / {shared}"
            if shared > 1
            else f" = {recipe.micro_batch_size} x {num_processes}"
        )
        raise ValueError(f"batch_size {recipe.batch_size} is not a multiple of micro_batch_size x processes{sharing}")


def check_teacher(recipe: RetrofitRecipe, teacher: nn.Module | None, attention: PackedAttention | None) -> None:
    """Raises ValueError where a teacher that is another model could not read the run's sequences."""
    if attention is None:
        problem = "the student's own masks keep packed documents apart, and its may not" if recipe.data.packs else None
    elif attention.size > 1:
        problem = f"sequence_parallel is {attention.size}, and whether its heads can be shared is not known"
    else:
        other = other_attention(teacher, {})
        problem = f"it has layers whose attention is not computed here ({', '.join(other)})" if other else None
    if problem is not None:
        raise ValueError(f"teacher {recipe.teacher} cannot read this run's sequences: {problem}; choose another teacher, or leave it out")


def make_attention(recipe: RetrofitRecipe, accelerator: Accelerator, student: nn.Module) -> PackedAttention | None:
    """Attention over packed sequences, or over sequences that this process shares with its neighbours.

    None: each sequence is one document and is in one process, or the model has a kind of attention that only transformers computes.

    Raises:
        ValueError: sequences that these processes cannot share.
    """
    size = recipe.sequence_parallel
    if size == 1:
        return local_rows(student, packs=recipe.data.packs)
    check_sharing(student, size, recipe.data.length, state_of(student).skipped)
    timeout = timedelta(minutes=recipe.timeout_minutes)
    # torch requires all processes to make all groups, in the same order.
    groups = [
        torch.distributed.new_group(list(range(first, first + size)), timeout=timeout)
        for first in range(0, accelerator.num_processes, size)
    ]
    return PackedAttention(groups[accelerator.process_index // size])


def sharded_loading(recipe: RetrofitRecipe, num_processes: int, dtype: str) -> AbstractContextManager:
    """Within it transformers builds and loads models straight into ZeRO-3's shards. Nothing under other stages."""
    if recipe.zero.stage != 3:
        return nullcontext()
    # The dtype that shards are made in; the engine itself never sees this switch.
    return compat.sharded_models({**deepspeed_config(recipe, num_processes), "bf16": {"enabled": dtype == "bfloat16"}})


def make_optimizer(groups: list[dict[str, Any]], recipe: RetrofitRecipe, console: Console | None) -> torch.optim.Optimizer:
    """AdamW. DeepSpeed's for a CPU where the state is offloaded and a compiler is at hand, else torch's."""
    settings = recipe.optimizer
    beta1, beta2 = settings.betas
    if recipe.zero.offload_optimizer != "none":
        reason = _why_no_compiled_adam(console)
        if reason is None:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, lr=settings.lr, betas=(beta1, beta2), weight_decay=settings.weight_decay)
        if console is not None:
            console.print(f"the offloaded optimizer is torch's AdamW, slower than DeepSpeed's: {reason}", highlight=False, markup=False)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(beta1, beta2), weight_decay=settings.weight_decay)


def _why_no_compiled_adam(console: Console | None) -> str | None:
    """Why DeepSpeedCPUAdam cannot be built here, or None after it was (about 40 s the first time)."""
    absent = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    everywhere = [absent]
    if torch.distributed.is_initialized():
        # All processes must step alike.
        everywhere = [absent] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, absent)
    for names in everywhere:
        if names:
            return f"{' and '.join(names)} not on PATH"
    tell = (lambda text: None) if console is None else partial(console.print, highlight=False, markup=False)
    try:
        build_operator("CPUAdam", tell=tell)
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways; the run does not need this one
        return f"it does not build ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return None


class Engine:
    """A module, its optimizer and how they step, alike for data parallelism and ZeRO.

    The loss handed to `backward` is this process's share of the sum over all.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, groups: list[dict[str, Any]], recipe: RetrofitRecipe, console: Console | None
    ):
        """groups: of parameters (`params`) with the learning rate of each (`peak_lr`), which schedules multiply."""
        self.accelerator, self.recipe = accelerator, recipe
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.is_deepspeed = recipe.zero.stage > 0
        # Any: DeepSpeed's engine, the data-parallel wrapper or the module itself; None after leave_group.
        self.module: Any
        self.optimizer: torch.optim.Optimizer
        optimizer = make_optimizer(groups, recipe, console)
        if self.is_deepspeed:
            self.module, self.optimizer = compat.prepare_engine(accelerator, module, optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare(module, optimizer)[0], optimizer

    def leave_group(self) -> None:
        """Leave the process group together with all others, so that none takes another's end for a failure. No steps after it."""
        if not torch.distributed.is_initialized():
            return
        torch.distributed.barrier()
        if not self.is_deepspeed:
            # The wrapper's reducer must not be the last to hold the process group: freed by it, Python's lock is held while gloo
            # waits for its threads, and one of them may be waiting for that lock.
            self.accelerator.free_memory()
            self.module = None
        torch.distributed.destroy_process_group()

    def set_learning_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch: gradients are reduced over processes after a step's last one only."""
        if self.is_deepspeed:
            self.module.set_gradient_accumulation_boundary(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        # Both engines average gradients over processes, and the loss is a share of a sum.
        loss = loss * self.accelerator.num_processes
        if self.is_deepspeed:
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    def step(self) -> float:
        """Clip, step and clear. Returns the norm of all gradients.

        Raises:
            FloatingPointError: a norm that is not finite.
        """
        if self.is_deepspeed:
            self.module.step()
            norm = float(self.module.get_global_grad_norm())
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.grad_clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        if not self.is_deepspeed:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm


def write_config(folder: Path, recipe: RetrofitRecipe, num_processes: int) -> None:
    """Write deepspeed.json into the run's folder, for people: nothing reads it back."""
    if recipe.zero.stage > 0:
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed_config(recipe, num_processes), indent=1), encoding="utf-8")
