"""Recipes: one strict, typed YAML file says everything about a run.

Unknown, misspelt, duplicate or mistyped keys are errors. `extends: NAME` starts from another recipe, one level deep;
`a.b=c` on the command line overrides with the same types.
"""

import importlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from dms.config import DMSConfig, nearest
from dms.strict import Strict, explain

Recipe = TypeVar("Recipe", bound=BaseModel)


def _method(value: Any) -> DMSConfig:
    """The section `dms`; DMSConfig checks itself, with the same messages."""
    if isinstance(value, DMSConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a section of keys and values, such as {{window: 16}}, is needed; given: {value!r}")
    return DMSConfig(**value)


class Optimizer(Strict):
    """AdamW, warmed up linearly."""

    lr: float = Field(gt=0.0)
    base_lr: float | None = Field(default=None, gt=0.0)
    """`trainable: all` and `gates+lora` only: the learning rate of all that is not a gate; `lr` is then that of the gates."""
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    weight_decay: float = Field(default=0.0, ge=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of all gradients together."""
    final_lr: float = Field(default=1.0, ge=0.0, le=1.0)
    """The last step's learning rate as a share of `lr`; below 1 it falls along a cosine."""


class Data(Strict):
    """Where documents come from. Exactly one source."""

    source: Literal["builtin", "text", "jsonl", "dataset"]
    """builtin: standard-library sources with planted tasks; text / jsonl: local files; dataset: an id for `datasets`."""
    length: int = Field(ge=8)
    """Tokens of each training sequence."""
    path: str | None = None
    """File, folder or glob (text, jsonl), or the dataset's id (dataset)."""
    config: str | None = None
    """The dataset's configuration name."""
    split: str = "train"
    field: str = "text"
    """The column or key that holds a document's text."""
    items: list[int] = Field(default=[20, 40], min_length=2, max_length=2)
    """builtin: how many tasks are planted in a document, from and to."""

    @model_validator(mode="after")
    def _check(self):
        if self.source == "builtin" and self.path is not None:
            raise ValueError("data.path has no effect with source: builtin; remove it or choose source text, jsonl or dataset")
        if self.source != "builtin" and self.path is None:
            raise ValueError(
                f"data.path is missing: source {self.source} needs {'a dataset id' if self.source == 'dataset' else 'a file, folder or glob'}"
            )
        if not 0 <= self.items[0] <= self.items[1]:
            raise ValueError(f"data.items is {self.items}; give [from, to] with 0 <= from <= to")
        return self


class Evaluation(Strict):
    """The run's own evaluation: held-out documents of the built-in source."""

    num_documents: int = Field(default=56, ge=1)
    length: int | None = Field(default=None, ge=64)
    """Tokens of a document; None: `data.length`."""
    num_items: int = Field(default=24, ge=1)
    """Tasks planted in each."""
    batch_size: int = Field(default=4, ge=1)


class Tracking(Strict):
    """Where the run is followed; a resumed run stays the same run."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where a key is configured, else offline."""
    tensorboard: bool = False
    """Write TensorBoard event files to `output_dir`/tensorboard."""
    project: str = "dms"
    name: str | None = None
    """None: the name of `output_dir`."""
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default=[])


class Zero(Strict):
    """DeepSpeed ZeRO: what is divided among processes, and what rests outside the GPU. Its configuration is derived from this."""

    stage: Literal[0, 2, 3] = 0
    """0: plain data parallelism, no DeepSpeed; 2: optimizer state and gradients are divided; 3: weights as well."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Stage 3 only: where weights rest between their uses."""
    nvme_path: str | None = None
    """A folder on a local disk, for nvme."""

    @property
    def offloads_to_nvme(self) -> bool:
        return "nvme" in (self.offload_optimizer, self.offload_param)

    @model_validator(mode="after")
    def _check(self):
        if self.stage == 0 and (self.offload_optimizer != "none" or self.offload_param != "none"):
            raise ValueError("offloading has no effect with zero.stage 0; choose stage 2 or 3, or offload nothing")
        if self.stage == 2 and self.offload_param != "none":
            raise ValueError(f"zero.offload_param: {self.offload_param} needs stage 3: stage 2 keeps all weights on every GPU")
        if self.stage == 2 and self.offload_optimizer == "nvme":
            raise ValueError("zero.offload_optimizer: nvme needs stage 3; with stage 2 choose cpu")
        if self.offloads_to_nvme and self.nvme_path is None:
            raise ValueError("zero.nvme_path is missing: nvme needs a folder on a local disk")
        if self.nvme_path is not None and not self.offloads_to_nvme:
            raise ValueError("zero.nvme_path has no effect without nvme in offload_optimizer or offload_param; remove it")
        return self


class Lora(Strict):
    """`trainable: gates+lora`: low-rank adapters on the base's linear layers, merged into its weights at the end."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0.0)
    """The adapters' product is multiplied by alpha / rank."""
    target_modules: list[str] | None = None
    """Names of linear layers, such as q_proj; None: all but the head."""


class Save(Strict):
    """Checkpoints to resume from: what trains, the optimizer and the run's position. SIGTERM and SIGUSR1 save one and stop."""

    every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0: none but those below."""
    at_cr: list[float] = Field(default=[])
    """Also when the scheduled ratio reaches these; kept whatever `keep_last` says."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the periodic ones stay."""


class RetrofitRecipe(Strict):
    """`dms retrofit`: teach a pretrained model's gates which KV entries to evict."""

    model: str
    """A folder, a hub id, or `builtin:tiny`."""
    output_dir: str
    target_cr: float = Field(ge=1.0)
    """The compression ratio of decided tokens at the end; it rises linearly from 1 ([P] section 3.2)."""
    dms: Annotated[DMSConfig, PlainValidator(_method), PlainSerializer(asdict)]
    data: Data
    optimizer: Optimizer
    steps: int = Field(ge=1)
    ramp: float = Field(default=0.8, gt=0.0, le=1.0)
    """The share of the steps over which the ratio rises; then it stays."""
    batch_size: int = Field(ge=1)
    """Sequences of an optimizer step, over all devices and accumulation steps."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences of one forward on one device."""
    trainable: Literal["gates", "gates+lora", "all"] = "gates"
    """gates: the base is frozen and is its own teacher; gates+lora: adapters besides, off in the teacher's pass; all: every
    weight, with a frozen copy as teacher."""
    lora: Lora | None = None
    """`trainable: gates+lora` only; None: the defaults."""
    beta: float = Field(default=0.0, ge=0.0, le=1.0)
    """The distillation divergence: 0 KL(teacher || student), 1 KL(student || teacher), between: generalised JSD."""
    compression_weight: float = Field(default=1.0, gt=0.0)
    """Factor of the hinge on the share of evicted tokens."""
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    loss_chunk: int = Field(default=2048, ge=1)
    """Tokens whose logits are alive at once in the loss."""
    seed: int = 0
    zero: Zero = Zero()
    save: Save = Save()
    resume: Literal["auto", "never"] = "auto"
    """auto: an unfinished run of this recipe that `output_dir` holds is continued from its last good checkpoint."""
    timeout_minutes: float = Field(default=30.0, gt=0.0)
    """How long a process waits for the others before the run fails."""
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    overwrite: bool = False
    """Delete a run that `output_dir` holds and that is not continued. Without it, that is refused."""

    @model_validator(mode="after")
    def _check(self):
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; change one of them"
            )
        if self.trainable != "gates" and self.optimizer.base_lr is None:
            raise ValueError(
                f"optimizer.base_lr is missing: with trainable: {self.trainable}, lr is the gates' and base_lr that of all else that trains"
            )
        if self.trainable == "gates" and self.optimizer.base_lr is not None:
            raise ValueError("optimizer.base_lr has no effect with trainable: gates; remove it")
        if self.trainable != "gates+lora" and self.lora is not None:
            raise ValueError(f"lora has no effect with trainable: {self.trainable}; remove it, or choose gates+lora")
        if self.zero.offload_optimizer == "nvme" and (self.save.every or self.save.at_cr):
            raise ValueError(
                "an optimizer on nvme cannot be saved yet: set save.every=0 and no save.at_cr (the run then cannot be continued), "
                "or zero.offload_optimizer=cpu"
            )
        if outside := [cr for cr in self.save.at_cr if not 1.0 < cr <= self.target_cr]:
            raise ValueError(f"save.at_cr has {outside}; the ratio rises from 1 to target_cr {self.target_cr:g}, choose values in between")
        if self.dms.window >= self.data.length:
            raise ValueError(
                f"dms.window is {self.dms.window} and data.length {self.data.length}: no token would ever leave the window; lengthen the data or narrow the window"
            )
        return self


class Stage(Strict):
    """One stretch of pre-training with documents of one length."""

    length: int = Field(ge=64)
    batch_size: int = Field(ge=1)
    steps: int = Field(ge=1)
    items: list[int] = Field(min_length=2, max_length=2)


class Architecture(Strict):
    """A Llama: tied embeddings, grouped-query attention."""

    hidden_size: int = Field(ge=32)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=8)
    intermediate_size: int = Field(ge=32)
    context: int = Field(ge=64)
    rope_theta: float = Field(default=100000.0, gt=0.0)


class PretrainRecipe(Strict):
    """`dms pretrain`: make a small language model and its tokenizer from the built-in source."""

    output_dir: str
    vocab_size: int = Field(ge=1024)
    architecture: Architecture
    stages: list[Stage] = Field(min_length=1)
    optimizer: Optimizer
    answer_weight: float = Field(default=4.0, gt=0.0)
    """Loss weight of answers; running text has 1."""
    planted_weight: float = Field(default=0.3, ge=0.0)
    """Loss weight of planted names and values, which cannot be predicted."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: int = 0
    save_minutes: float = Field(default=5.0, gt=0.0)
    """Minutes between checkpoints; the same command continues from the last one."""
    evaluation: Evaluation = Evaluation()


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: duplicate keys are errors, `1e-5` is a number, only true and false are booleans."""


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_StrictLoader.yaml_implicit_resolvers = {
    key: [resolver for resolver in resolvers if resolver[0] not in _REPLACED]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|nan)$"), list("-+0123456789.")
)
# Whole numbers stay integers: the resolver that was added last would win otherwise.
for _key, _resolvers in _StrictLoader.yaml_implicit_resolvers.items():
    _resolvers.sort(key=lambda r: r[0] == "tag:yaml.org,2002:float")


def _no_duplicates(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a word")
        if key in mapping:
            raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def parse_yaml(text: str, source: str) -> Any:
    """Raises ValueError with the place for anything that is not plain, unambiguous YAML."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def packaged_recipes() -> dict[str, Path]:
    root = Path(next(iter(importlib.import_module("dms.recipes").__path__)))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """A path, or the name of a packaged recipe such as `tiny/retrofit`."""
    for candidate in (Path(name).expanduser(), *((beside / name, beside / f"{name}.yaml") if beside else ())):
        if candidate.is_file():
            return candidate
    known = packaged_recipes()
    short = name.removesuffix(".yaml").removeprefix("recipes/")
    if short in known:
        return known[short]
    raise ValueError(f"recipe {name!r} is neither a file nor a packaged recipe{nearest(short, known)}; packaged: {', '.join(known)}")


def load_recipe(name: str, overrides: list[str], schema: type[Recipe]) -> Recipe:
    """Read, extend, override and validate a recipe.

    Raises:
        ValueError: naming the file, the key, what was given and what is allowed.
    """
    path = find_recipe(name)
    values = _read_mapping(path)
    if "extends" in values:
        parent_path = find_recipe(str(values.pop("extends")), path.parent)
        parent = _read_mapping(parent_path)
        if "extends" in parent:
            raise ValueError(f"{path}: extends {parent_path.name}, which extends another recipe; one level is allowed")
        values = _merge(parent, values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} is not of the form key=value")
        _set(values, key.split("."), parse_yaml(text, f"override {override!r}"), override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"recipe {name}: {explain(error, schema)}") from None


def _read_mapping(path: Path) -> dict:
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values, this is {type(values).__name__}")
    return values


def _merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _set(values: dict, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {key} is not a section")
    values[keys[-1]] = value


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, readable by `load_recipe`."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)
