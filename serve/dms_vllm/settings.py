"""What is served, and how: the gates beside a model's weights, and the options that `--additional-config '{"dms": {...}}'` carries."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dms.cache.page_pool import check_kv_dtype
from dms.config import DMSConfig, nearest
from dms.io.base_models import auto_class, load_config
from dms.io.gates_file import check_base, read_config, read_gates
from dms.layer_discovery import DecoderLayers, find_layers

# vLLM's --kv-cache-dtype, and what pages then hold. vLLM has no name for int4; `Options.kv_dtype` has all of ours.
VLLM_KV_DTYPES = {"auto": None, "int8_per_token_head": "int8"}


@dataclass(frozen=True)
class Options:
    """Of `--additional-config`, under "dms".

    Raises:
        ValueError: unknown names, or values out of range.
    """

    evict_bias: float = 0.0
    """Added to every gate's logit: above 0 evicts more than was trained, below 0 less."""
    page_size: int = 16
    """Entries of a page: 16, 32 or 64."""
    pages_per_voucher: int = 4
    """Pages that one of vLLM's blocks stands for."""
    prefix_every: int = 256
    """Keep prompts' prefixes at multiples of so many tokens for others that begin alike, and what finished requests hold; 0: nothing, as under
    --no-enable-prefix-caching."""
    kv_dtype: str | None = None
    """How pages hold entries: int8, fp8 or int4; None: as --kv-cache-dtype says."""
    loops: bool = False
    """Keep every request by itself while it decodes: slow, the reference."""

    def __post_init__(self):
        if self.page_size not in (16, 32, 64):
            raise ValueError(f"dms.page_size is {self.page_size!r}; a page holds 16, 32 or 64 entries")
        if not isinstance(self.pages_per_voucher, int) or self.pages_per_voucher < 1:
            raise ValueError(f"dms.pages_per_voucher is {self.pages_per_voucher!r}; it is a number of pages from 1")
        if not isinstance(self.prefix_every, int) or self.prefix_every < 0:
            raise ValueError(f"dms.prefix_every is {self.prefix_every!r}; it is a number of tokens, or 0 to keep no prefixes")
        if isinstance(self.evict_bias, bool) or not isinstance(self.evict_bias, int | float):
            raise ValueError(f"dms.evict_bias is {self.evict_bias!r}; it is a number")
        check_kv_dtype(self.kv_dtype)

    def pages(self, cache_dtype: str) -> str | None:
        """The `kv_dtype` of the pages. cache_dtype: vLLM's --kv-cache-dtype.

        Raises:
            ValueError: one of vLLM's that pages have no form for, or that says something else than `kv_dtype`.
        """
        if cache_dtype not in VLLM_KV_DTYPES:
            raise ValueError(
                f"--kv-cache-dtype is {cache_dtype!r}; pages hold the model's own dtype (auto) or int8 with a scale an entry (int8_per_token_head); "
                'others by --additional-config \'{"dms": {"kv_dtype": "int4"}}\', or "fp8"'
            )
        named = VLLM_KV_DTYPES[cache_dtype]
        if named is not None and self.kv_dtype not in (None, named):
            raise ValueError(f"--kv-cache-dtype is {cache_dtype!r} and dms.kv_dtype {self.kv_dtype!r}; give one of them")
        return named or self.kv_dtype

    @classmethod
    def of(cls, vllm_config: Any) -> "Options":
        given = (vllm_config.additional_config or {}).get("dms", {})
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"--additional-config: dms has no option {unknown[0]!r}{nearest(unknown[0], known)}; it has {', '.join(known)}"
            )
        return cls(**given)


@dataclass(frozen=True)
class Served:
    """The gates of a model folder."""

    folder: Path
    config: DMSConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @classmethod
    def of(cls, model: str, revision: str | None = None) -> "Served":
        """Of a folder, or of a repository on the hub, whose gates are fetched where they are not here.

        Raises:
            ValueError: no gates there, or gates of other weights than lie beside them.
        """
        folder = Path(model).expanduser()
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            names = ["config.json", "*.safetensors.index.json", "gates.safetensors"]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=names))
        tensors, metadata = read_gates(folder)
        in_config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dms")
        return cls(folder, read_config(metadata, in_config, folder), tensors, metadata)

    def check_weights(self) -> None:
        """Raises ValueError where the weights beside the gates are not those that they were trained on."""
        check_base(self.folder, self.metadata, str(self.folder), form=self.metadata.get("base_form"))

    def layers(self) -> DecoderLayers:
        """Which layers the gates belong to, by the model's configuration alone."""
        config = load_config(str(self.folder))
        with torch.device("meta"):
            return find_layers(auto_class(config).from_config(config))
