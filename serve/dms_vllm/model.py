"""Any decoder of vLLM's transformers backend, with gates on its attention modules and attention over pages of the one pool.

Shapes: N tokens of all requests of a step; Hq query heads, H KV heads, D head dim, M model dim; K windows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder

from dms import borrowed
from dms.cache.page_pool import HostCopy
from dms.config import DMSConfig
from dms.gates import BorrowedGate, Gate
from dms.hf_compat import query_modules
from dms.layer_discovery import AttentionLayer
from dms_vllm import ATTEND
from dms_vllm.accounting import PoolSpec
from dms_vllm.events import BecameFork, Began, DroppedFork, Ended, Event, KeepFork
from dms_vllm.pool import FixedPool, page_bytes
from dms_vllm.settings import Options, Served
from dms_vllm.vouchers import Geometry, Report
from dms_vllm.worker import Part, Step, Worker, sliding

# vLLM looks for a layer's number in its name.
POOL = "model.layers.0.dms_pool"
# Prompts hold more than their ratio says, which is that of their end: at first they are expected to hold so many times as much.
_FIRST_SHARE = 2.0


@torch.library.custom_op(ATTEND, mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, evicts: torch.Tensor, layer: int) -> torch.Tensor:
    """q [N, Hq, D], k and v [N, H, D], evicts [N, H] or [N, H, K] bool -> [N, Hq, D]. Opaque to torch.compile, as vLLM's own attention is; it
    stores keys and values behind the compiler's back, as that does."""
    context = get_forward_context()
    if context.attn_metadata is None:
        # vLLM measures the memory that a pass takes.
        return torch.zeros_like(q)
    return context.no_compile_layers[POOL].attend(layer, context.attn_metadata[POOL], q, k, v, evicts)


@attend.register_fake
def _(q, k, v, evicts, layer):
    return torch.empty_like(q)


class GatedAttention(nn.Module):
    """In place of vLLM's Attention. Its arguments are those that the transformers backend gives."""

    def __init__(
        self,
        *,
        num_heads: int,
        head_size: int,
        num_kv_heads: int,
        scale: float,
        logits_soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
        **_: Any,
    ):
        super().__init__()
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.softcap, self.sinks = scale, logits_soft_cap, sinks
        self.has_sink = sinks is not None
        self.layer = -1
        """Its number in the pool."""
        self.sliding_window: int | None = None
        """Tokens that a query sees, its own among them, in a layer without a gate."""
        self.num_windows = 1
        """Of the gates."""
        self.evicts: torch.Tensor | None = None
        """[N, H] or [N, H, K] bool, from the gate until the keys come."""
        self.without_channel = False
        """The channel that its gate borrows is 0 after rotation too (gate `borrowed`)."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """query [N, Hq * D], key and value [N, H * D] -> [N, Hq * D]."""
        N = query.shape[0]
        q, k, v = (x.reshape(N, -1, self.head_size) for x in (query, key, value))
        evicts, self.evicts = self.evicts, None
        if self.sliding_window is not None:
            shape = (N, self.num_kv_heads, *((self.num_windows,) if self.num_windows > 1 else ()))
            evicts = torch.ones(shape, dtype=torch.bool, device=q.device)
        assert evicts is not None, "the gate runs before its attention"
        if self.without_channel:
            q = borrowed.without_channel(q[None].transpose(1, 2), self.num_kv_heads).transpose(1, 2)[0]
        return torch.ops.dms_vllm.attend(q, k, v, evicts, self.layer).reshape(N, -1)


class GateBefore:
    """A forward pre-hook of an attention module: runs the gate on what attention reads."""

    def __init__(self, bias: float):
        self.bias = bias

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        module.attn.evicts = (module.dms_gate(hidden) + self.bias > 0)[0]


class GateWithin:
    """A forward hook of what makes an attention module's queries: lets a borrowed gate decide by its channel, and hands them on without it."""

    def __init__(self, attention: GatedAttention, gate: BorrowedGate, bias: float):
        self.attention, self.gate, self.bias = attention, gate, bias

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        attn = self.attention
        channel, output = borrowed.take_channel(output, attn.num_heads, attn.num_kv_heads, attn.head_size)
        attn.evicts = (self.gate(channel) + self.bias > 0)[0]
        return output


@dataclass(frozen=True, eq=False)
class Spans:
    """What vLLM says of a step."""

    begins: list[int]
    """Where each request's tokens begin in the step, and where the last one's end."""
    numbers: HostCopy
    """The first block of each request's table, then each one's length with the step's tokens."""

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Of each request with tokens: the first block of its table, where its tokens begin and end in the step, and the first one's position."""
        numbers, count = self.numbers.numbers(), len(self.begins) - 1
        spans = zip(numbers[:count], self.begins, self.begins[1:], numbers[count:], strict=False)
        return [(block, begin, end, length - (end - begin)) for block, begin, end, length in spans if end > begin]


class StepBuilder(AttentionMetadataBuilder[Spans]):
    """What the layers are told of a step: whose tokens it has, by the first block of each request's table."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Spans:
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        # They are on their way while the pass begins; the first layer with pages waits for them.
        numbers = torch.cat([common.block_table_tensor[:count, 0].int(), common.seq_lens[:count].int()])
        return Spans(common.query_start_loc_cpu[: count + 1].tolist(), HostCopy(numbers))


class PoolBackend(AttentionBackend):
    supported_dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("attention over pages is GatedAttention's")

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder


@dataclass(frozen=True)
class AttentionOptions:
    """Of a layer, as `Worker.attend` takes them."""

    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None


class Pool(nn.Module, AttentionLayerBase):
    """The one "layer" of whose cache vLLM knows: the pool of all layers, in the memory that vLLM gives it."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: DMSConfig,
        options: Options,
        layers: list[GatedAttention],
        max_tokens: int,
        target_cr: float | None,
    ):
        """layers: those with gates, then those with a sliding window. max_tokens: of the longest request. target_cr: that the gates were
        trained for."""
        super().__init__()
        self.config, self.options = config, options
        self.attention = [AttentionOptions(layer.scale, layer.softcap, layer.sinks) for layer in layers]
        self.head_dim, self.dtype = layers[0].head_size, vllm_config.model_config.dtype
        self.kv_dtype = options.pages(vllm_config.cache_config.cache_dtype)
        entry = page_bytes(1, self.head_dim, self.dtype, self.kv_dtype, config.windows)
        K = len(config.windows)
        self.configs = [config if layer.sliding_window is None else sliding(layer.sliding_window, K) for layer in layers]
        self.num_gated = sum(layer.sliding_window is None for layer in layers)
        # A ring's entry: key and value in the model's dtype, and its state.
        ring_entries = sum(layer.num_kv_heads * (c.windows[0] + 1) for layer, c in zip(layers, self.configs, strict=True))
        ring_bytes = ring_entries * (2 * self.head_dim * self.dtype.itemsize + 1)
        geometry = Geometry(
            lines=sum(layer.num_kv_heads for layer in layers[: self.num_gated]),
            windows=config.windows,
            page_size=options.page_size,
            pages_per_voucher=options.pages_per_voucher,
            ring_pages=-(-ring_bytes // (options.page_size * entry)),
        )
        self.spec = PoolSpec.of(
            geometry,
            page_bytes=options.page_size * entry,
            max_tokens=max_tokens,
            prefix_every=options.prefix_every,
            kept=min(1.0, _FIRST_SHARE / target_cr) if target_cr else 1.0,
        )
        self.worker: Worker | None = None
        self.blocks: dict[int, str] = {}
        """The request that each first block names."""
        self.spans: Spans | None = None
        self.step: Step | None = None
        vllm_config.compilation_config.static_forward_context[POOL] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PoolBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> PoolSpec:
        return self.spec

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        self.kv_cache = kv_cache
        if kv_cache.numel() == 0:
            return
        pool = FixedPool(
            kv_cache.reshape(-1).view(torch.int8),
            self.options.page_size,
            self.head_dim,
            self.dtype,
            kv_dtype=self.kv_dtype,
            windows=self.config.windows,
        )
        self.worker = Worker(self.configs, self.num_gated, pool, self.spec.geometry.horizons, loops=self.options.loops)

    def take_events(self, events: list[Event]) -> None:
        """What the scheduler says before a step."""
        assert self.worker is not None, "memory comes before requests"
        for event in events:
            match event:
                case Began():
                    self.blocks[event.block] = event.request
                    self.worker.begin(event.request, event.fork)
                case Ended():
                    self.worker.end([event.request])
                case KeepFork():
                    self.worker.keep_fork(event.request, event.num_tokens, event.fork)
                case BecameFork():
                    self.worker.become_fork(event.request, event.fork)
                case DroppedFork():
                    self.worker.drop_fork(event.fork)

    def held(self) -> dict[str, int]:
        """As of `Worker.held`."""
        assert self.worker is not None, "memory comes before requests"
        return self.worker.held()

    def report(self) -> dict[str, Report]:
        """Of the requests of the last step."""
        step, self.step = self.step, None
        return {} if step is None or self.worker is None else self.worker.report(step)

    def attend(self, layer: int, spans: Spans, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, evicts: torch.Tensor) -> torch.Tensor:
        assert self.worker is not None, "memory comes before requests"
        if self.spans is not spans:
            # The first layer of a step. What the scheduler says of requests comes after the spans, and before this.
            self.spans = spans
            self.step = self.worker.plan([Part(self.blocks[block], begin, end, position) for block, begin, end, position in spans.parts()])
        assert self.step is not None, "it was planned"
        how = self.attention[layer]
        return self.worker.attend(layer, self.step, q, k, v, evicts, scale=how.scale, softcap=how.softcap, sink_logits=how.sink_logits)


class DMSForCausalLM(TransformersForCausalLM):
    def _get_attn_cls(self) -> Any:
        return GatedAttention

    def _create_attention_instances(self, prefix: str = "") -> None:
        super()._create_attention_instances(prefix)
        model = self.model_config
        served, options = Served.of(model.model, model.revision), Options.of(self.vllm_config)
        found = served.layers()
        gated = {layer.index: layer for layer in found.gated}
        sliding_window = getattr(self.text_config, "sliding_window", None)
        of_type = dict(enumerate(getattr(self.text_config, "layer_types", None) or []))
        self.gates: dict[int, tuple[str, Gate]] = {}
        layers: list[GatedAttention] = []
        # Those with gates first: of these alone are the reports.
        for index, (name, _) in sorted(self.attention_fusers.items(), key=lambda item: (item[0] not in gated, item[0])):
            module = self.get_submodule(name)
            module.attn.layer, module.attn.num_windows = len(layers), len(served.config.windows)
            layers.append(module.attn)
            if index in gated:
                self._add_gate(name, module, gated[index], served, options)
            elif of_type.get(index) == "sliding_attention" and sliding_window and index not in {layer.index for layer in found.following}:
                module.attn.sliding_window = sliding_window
            else:
                why = next(
                    (why for skipped, why in found.skipped.items() if name.endswith(skipped.removeprefix("model."))), "it has no gate"
                )
                raise ValueError(
                    f"{served.folder}: {name} is neither a layer with a gate nor one with a sliding window ({why}), and the server takes no others; "
                    "use dms.load(...).generate"
                )
        if len({layer.head_size for layer in layers}) > 1:
            raise ValueError(
                f"{served.folder}: layers have heads of different sizes, and the pages of all are of one; use dms.load(...).generate"
            )
        self.served, self.num_kv_heads_of_all = served, {layer.index: layer.num_heads for layer in found.gated}
        self.dms_pool = Pool(
            self.vllm_config, served.config, options, layers, model.max_model_len, float(served.metadata.get("target_cr") or 0) or None
        )

    def _add_gate(self, name: str, module: Any, layer: AttentionLayer, served: Served, options: Options) -> None:
        if served.config.gate == "linear":
            normalize = not layer.normalized_input
            gate = Gate(self.text_config.hidden_size, module.attn.num_kv_heads, served.config, normalize=normalize)
            module.add_module("dms_gate", gate.to(self.device_config.device))
            module.register_forward_pre_hook(GateBefore(options.evict_bias), with_kwargs=True)
            self.gates[layer.index] = (f"{name}.dms_gate", gate)
        else:
            # Its weights are the query projection's own rows.
            module.attn.without_channel = served.config.gate == "borrowed"
            projection, norm, _ = query_modules(module)
            queries = projection if norm is None else norm
            queries.register_forward_hook(GateWithin(module.attn, BorrowedGate(served.config), options.evict_bias))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The weights, and the gates beside them, of which each rank takes those of its heads."""
        # Other loaders than the default read every file of the folder.
        loaded = super().load_weights((name, tensor) for name, tensor in weights if not is_gate(name))
        for index, (path, gate) in self.gates.items():
            for part, parameter in gate.named_parameters():
                whole = self.served.tensors[f"layers.{index}.gate.{part}"]
                own = own_rows(whole, len(parameter), self.num_kv_heads_of_all[index])
                parameter.data.copy_(own)
                loaded.add(f"{path}.{part}")
        return loaded


def is_gate(name: str) -> bool:
    return name.startswith("layers.") and ".gate." in name


def own_rows(whole: torch.Tensor, num_rows: int, num_heads: int) -> torch.Tensor:
    """The rows of a gate's tensor that are this rank's: those of its KV heads, of which ranks may share one; all where the heads share them."""
    rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    if len(whole) == num_rows:
        return whole
    first = rank * num_heads // world * (len(whole) // num_heads)
    return whole[first : first + num_rows]
