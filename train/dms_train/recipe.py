"""The recipes' sections and keys, with their types and checks. `recipe_file` reads and writes them."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from dms.config import DMSConfig
from dms.strict_config import Strict
from dms_train.data.compressed import SUFFIXES
from dms_train.data.settings import Data, Prompts


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
    """The largest learning rate, of the gates."""
    base_lr: float | None = Field(default=None, gt=0.0)
    """`trainable: all` and `gates+lora` only: the learning rate of all that is not a gate; `lr` is then that of the gates."""
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    grad_clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of all gradients together."""
    final_lr: float = Field(default=1.0, ge=0.0, le=1.0)
    """The last step's learning rate as a share of `lr`; below 1 it falls along a cosine."""


class Evaluation(Strict):
    """The run's own evaluation: held-out documents of the built-in source."""

    num_documents: int = Field(default=56, ge=1)
    """Documents, read by dense, dms and sliding_window alike."""
    length: int | None = Field(default=None, ge=64)
    """Tokens of a document; None: `data.length`."""
    num_items: int = Field(default=24, ge=1)
    """Tasks planted in each."""
    batch_size: int = Field(default=4, ge=1)
    """Documents of one forward."""


class Tracking(Strict):
    """Experiment trackers. A resumed run stays the same run there."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where a key is configured, else offline."""
    tensorboard: bool = False
    """Write TensorBoard event files to `output_dir`/tensorboard."""
    project: str = "dms"
    """The project in the tracker."""
    name: str | None = None
    """None: the name of `output_dir`."""
    entity: str | None = None
    """The user or team in wandb; None: wandb's default."""
    group: str | None = None
    """A group of runs in wandb; None: no group."""
    tags: list[str] = Field(default=[])
    """Tags in wandb."""


class Zero(Strict):
    """DeepSpeed ZeRO: what is divided among processes, and what is offloaded. DeepSpeed's configuration is derived from this."""

    stage: Literal[0, 2, 3] = 0
    """0: plain data parallelism, no DeepSpeed; 2: optimizer state and gradients are divided; 3: weights as well."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state rests; nvme needs stage 3."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Stage 3 only: where weights are kept between their uses."""
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
    """The adapters' inner dimension."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The adapters' product is multiplied by alpha / rank."""
    target_modules: list[str] | None = None
    """Names of linear layers, such as q_proj; None: all but the head."""


class Save(Strict):
    """Checkpoints to resume from: what trains, the optimizer and the run's position. SIGTERM and SIGUSR1 save one and stop."""

    every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0: none but those below."""
    at_cr: list[float] = Field(default=[])
    """Also when the scheduled ratio reaches these: ratio snapshots, which `keep_last` does not delete."""
    keep_last: int = Field(default=2, ge=1)
    """Periodic ones that are kept."""


class TeacherCacheSettings(Strict):
    """The teacher's log-probabilities of each training token, cached once with `dms cache-teacher` and read instead of running the teacher.

    Sequences are found by their content: recipes that differ in lr, target_cr, dms or trainable share a cache.
    """

    path: str
    """A folder."""
    top_k: int = Field(default=64, ge=1)
    """Most probable tokens of each distribution; all others together count as one. A cache with a larger K can be used."""


class WarmStart(Strict):
    """First train the gates on labels: the keys that the dense model reads least once the window has passed them are to be evicted.

    Labels keep what the first ratio of `save.at_cr` does, or `target_cr` where there is none.
    """

    steps: int = Field(ge=1)
    """How many of the run's `steps` come first on labels, a fifth of them, say. `optimizer`'s schedule runs once in them and once more in the
    rest."""
    lr: float | None = Field(default=None, gt=0.0)
    """The gates' largest learning rate in these steps; None: `optimizer.lr`."""
    start_cr: float | None = Field(default=None, ge=1.0)
    """The ratio from which the target then rises to `target_cr`, over the first `ramp` of the steps that are left; 1: as without a warm start.
    None: half of the labels' ratio."""

    def begins_at(self, labels_cr: float) -> float:
        """The ratio after these steps."""
        return max(1.0, labels_cr / 2.0) if self.start_cr is None else self.start_cr


class StartingGates(Strict):
    """Linear gates that are trained further, at another ratio, window or on other data, instead of gates that start at 0."""

    path: str
    """A folder that holds them: RUN/gates, RUN/model, or what `dms import` wrote. They were trained on `model`, or on another form of it."""
    start_cr: float = Field(default=1.0, ge=1.0)
    """The ratio that they were trained to, from which the target rises to `target_cr`; 1: the target starts anew."""


class RetrofitRecipe(Strict):
    """`dms retrofit`: teach a pretrained model's gates which KV entries to evict."""

    model: str
    """A folder, a hub id, a GGUF file (FOLDER/FILE.gguf, or HUB-ID:FILE.gguf), or `builtin:tiny`."""
    quantize: Literal["nf4", "int8", "torchao-int8", "torchao-int4"] | None = None
    """Pack the frozen base's linear layers when it is loaded, all but the head's: nf4, bitsandbytes' 4 bits in blocks of 64 whose scales are
    packed too (QLoRA's double quantisation); int8, bitsandbytes' LLM.int8; torchao-int8 and torchao-int4, torchao's weight-only kinds. None:
    as the model's files are, packed ones too. The run's model folder then holds the packed weights."""
    output_dir: str
    """The run folder; it must be new, empty, or hold an unfinished run of this recipe."""
    target_cr: float = Field(ge=1.0)
    """The compression ratio at the end, of what `budget` says; it rises linearly from 1 ([P] section 3.2), or from the start_cr of
    `warm_start` or `gates`."""
    budget: Literal["decided", "end", "mean"] = "decided"
    """What `target_cr` counts: decided, decisions, windows left aside; end, entries alive at a document's end, windows included; mean, their
    mean over positions. Several windows need end or mean."""
    dms: Annotated[DMSConfig, PlainValidator(_method), PlainSerializer(DMSConfig.to_dict)]
    gates: StartingGates | None = None
    """Gates to start from; None: gates of 0, which evict nothing."""
    data: Data
    optimizer: Optimizer
    steps: int = Field(ge=1)
    """Optimizer steps."""
    ramp: float = Field(default=0.8, gt=0.0, le=1.0)
    """The share of the steps over which the ratio rises; then it stays."""
    warm_start: WarmStart | None = None
    """First steps in which gates learn from labels; None: distillation from the first step on."""
    batch_size: int = Field(ge=1)
    """Sequences of an optimizer step, over all devices and accumulation steps."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences of one forward on one device."""
    trainable: Literal["gates", "gates+lora", "all"] = "gates"
    """gates: the base is frozen and is its own teacher; gates+lora: adapters besides, off in the teacher's pass; all: every
    weight, with a frozen copy as teacher."""
    lora: Lora | None = None
    """`trainable: gates+lora` only; None: the defaults."""
    teacher: str | None = None
    """Another model as teacher, a folder, hub id or GGUF file of the same vocabulary and any width, such as a larger one of the family. None:
    the model as it was."""
    beta: float = Field(default=0.0, ge=0.0, le=1.0)
    """The distillation divergence: 0 KL(teacher || student), 1 KL(student || teacher), between: generalised JSD."""
    compression_weight: float = Field(default=1.0, gt=0.0)
    """Factor of the hinge on the share of evicted tokens."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast to bfloat16; gates and the loss stay float32."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Processes that share each sequence, `data.length` / this many tokens each; 1: a sequence is in one process."""
    teacher_cache: TeacherCacheSettings | None = None
    """Read the teacher's log-probabilities from disk instead of running it; None: run it."""
    activation_checkpointing: bool = False
    """Keep of each layer its input and attention's output, and recompute the rest in the backward."""
    offload_activations: bool = False
    """Keep what activation checkpointing keeps in host memory."""
    loss_chunk: int | None = Field(default=None, ge=1)
    """Tokens whose logits are alive at once in the loss; None: as many as keep it within 1.5 GB."""
    seed: int = 0
    """Of noise, data order and initialisation."""
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
        if self.data.length % self.sequence_parallel:
            raise ValueError(
                f"data.length {self.data.length} is not a multiple of sequence_parallel {self.sequence_parallel}; change one of them"
            )
        if self.trainable != "gates" and self.optimizer.base_lr is None:
            raise ValueError(
                f"optimizer.base_lr is missing: with trainable: {self.trainable}, lr is the gates' and base_lr that of all else that trains"
            )
        if self.trainable == "gates" and self.optimizer.base_lr is not None:
            raise ValueError("optimizer.base_lr has no effect with trainable: gates; remove it")
        if self.trainable != "gates+lora" and self.lora is not None:
            raise ValueError(f"lora has no effect with trainable: {self.trainable}; remove it, or choose gates+lora")
        if self.quantize is not None:
            self.check_packed(f"quantize is {self.quantize}", "remove it")
        if self.offload_activations and not self.activation_checkpointing:
            raise ValueError("offload_activations has no effect without activation_checkpointing; set activation_checkpointing=true too")
        if self.teacher_cache is not None and self.beta != 0.0:
            raise ValueError(
                f"beta is {self.beta:g}, and a teacher cache works for the forward KL only: set beta=0, or remove teacher_cache"
            )
        if self.zero.offload_optimizer == "nvme" and (self.save.every or self.save.at_cr):
            raise ValueError(
                "an optimizer on nvme cannot be saved yet: set save.every=0 and no save.at_cr (the run then cannot be continued), "
                "or zero.offload_optimizer=cpu"
            )
        if self.warm_start is not None:
            self._check_warm_start(self.warm_start)
        self._check_at_cr()
        if self.teacher is not None and (name := next((n for n in ("teacher_cache", "warm_start") if getattr(self, n) is not None), None)):
            raise ValueError(f"{name} is made of the model itself, and teacher is {self.teacher}; remove one of them")
        if self.gates is not None:
            self._check_gates(self.gates)
        if self.dms.is_borrowed:
            self._check_borrowed()
        if len(self.dms.windows) > 1 and self.budget == "decided":
            raise ValueError(
                f"budget is decided and dms.window {list(self.dms.windows)}: lifetimes differ in what they save, which decisions do not tell; choose "
                "budget=end or budget=mean"
            )
        if self.dms.windows[0] >= self.data.length:
            raise ValueError(
                f"dms.window is {self.dms.to_dict()['window']} and data.length {self.data.length}: no token would ever leave the window; lengthen the data or narrow the window"
            )
        if self.dms.windows[-1] >= self.data.length:
            beyond = ", ".join(str(w) for w in self.dms.windows if w >= self.data.length)
            raise ValueError(
                f"dms.window is {list(self.dms.windows)} and data.length {self.data.length}: decisions of {beyond} would never count, and cannot be "
                "learned; lengthen the data, narrow these windows or leave them out"
            )
        return self

    def _check_gates(self, gates: StartingGates) -> None:
        if self.dms.is_borrowed:
            raise ValueError(f"gates.path is {gates.path}, and dms.gate {self.dms.gate}, which has no weights of its own; remove gates")
        if self.warm_start is not None:
            raise ValueError("warm_start trains gates from 0, and gates brings trained ones; remove one of them")
        if gates.start_cr > self.target_cr:
            raise ValueError(f"gates.start_cr is {gates.start_cr:g}, and the ratio rises from it to target_cr {self.target_cr:g}; lower it")

    def _check_borrowed(self) -> None:
        """Raises ValueError where rows of the base are gates, and could not train, or not as the recipe says."""
        given = f"dms.gate is {self.dms.gate}"
        if self.trainable != "all":
            raise ValueError(
                f"{given}: its weights are the base's, and its teacher the model as it was; with trainable: {self.trainable} choose all"
            )
        if self.optimizer.lr != self.optimizer.base_lr:
            raise ValueError(
                f"{given}: its weights train with base_lr, {self.optimizer.base_lr:g}, and lr, {self.optimizer.lr:g}, would have no effect; write the same in both"
            )
        for name in ("warm_start", "teacher_cache", "teacher"):
            if getattr(self, name) is not None:
                raise ValueError(f"{given}: {name} is for gates with weights of their own; remove it, or choose dms.gate: linear")

    def _check_warm_start(self, warm: WarmStart) -> None:
        if warm.steps >= self.steps:
            raise ValueError(f"warm_start.steps is {warm.steps} of {self.steps} steps, which leaves none for distillation; lower it")
        for key, value, needed, why in (
            ("zero.stage", self.zero.stage, 0, "DeepSpeed does not run its steps yet"),
            ("sequence_parallel", self.sequence_parallel, 1, "its labels are made of whole sequences"),
        ):
            if value != needed:
                raise ValueError(f"{key} is {value}, which does not go with warm_start ({why}); set {key}={needed}, or remove warm_start")
        if self.target_cr == 1.0:
            raise ValueError("target_cr is 1, with which the labels of warm_start evict nothing; raise it, or remove warm_start")
        if warm.start_cr is not None and warm.start_cr > self.target_cr:
            raise ValueError(
                f"warm_start.start_cr is {warm.start_cr:g}, and the ratio rises from it to target_cr {self.target_cr:g}; lower it"
            )
        num_held = min(self.dms.windows[0] + 1 + self.dms.sinks, self.data.length)
        held = {"decided": 0.0, "end": num_held / self.data.length, "mean": _mean_share(num_held, self.data.length)}[self.budget]
        if 1.0 / self.target_cr <= held:
            raise ValueError(
                f"the run is to keep 1 / target_cr = {1.0 / self.target_cr:.1%} of what budget={self.budget} counts, and window and sinks "
                f"alone hold {held:.1%} in data.length {self.data.length}; narrow the window, lengthen the data, or lower target_cr"
            )

    @property
    def labels_cr(self) -> float:
        """The ratio of `warm_start`'s labels."""
        return min(self.save.at_cr, default=self.target_cr)

    @property
    def start_cr(self) -> float:
        """The ratio from which distillation's target rises."""
        if self.gates is not None:
            return self.gates.start_cr
        return 1.0 if self.warm_start is None else self.warm_start.begins_at(self.labels_cr)

    def _check_at_cr(self) -> None:
        """Raises ValueError where the schedule does not pass the ratios of `save.at_cr` one after the other."""
        start_cr, warm_steps = self.start_cr, self.warm_start.steps if self.warm_start else 0
        if outside := [cr for cr in self.save.at_cr if not start_cr < cr <= self.target_cr]:
            raise ValueError(
                f"save.at_cr has {outside}; the ratio rises from {start_cr:g} to target_cr {self.target_cr:g}, choose values in between"
            )
        per_step = (self.target_cr - start_cr) / max(1.0, self.ramp * (self.steps - warm_steps))
        at_step: dict[int, float] = {}
        for cr in self.save.at_cr:
            step = warm_steps + math.ceil((cr - start_cr) / per_step - 1e-9)
            if step in at_step:
                raise ValueError(
                    f"save.at_cr has {at_step[step]:g} and {cr:g}, and the ratio passes both in step {step}; choose one, or more steps"
                )
            at_step[step] = cr

    def check_packed(self, why: str, cure: str) -> None:
        """Raises ValueError for what cannot be had with packed weights. why: what packs them; cure: what makes them ordinary ones."""
        if self.trainable == "all":
            raise ValueError(f"{why}, and packed weights do not train: choose trainable=gates or gates+lora, or {cure}")
        if self.zero.stage > 0:
            raise ValueError(f"{why}, and DeepSpeed does not handle packed weights: choose zero.stage 0 (what trains is small), or {cure}")


def _mean_share(num_held: int, length: int) -> float:
    """What the last `num_held` entries are of all, over the positions of a document together."""
    return sum(min(n, num_held) for n in range(1, length + 1)) / (length * (length + 1) / 2)


class PretrainStage(Strict):
    """A part of pre-training with documents of one length."""

    length: int = Field(ge=64)
    """Tokens of a document."""
    batch_size: int = Field(ge=1)
    """Documents of an optimizer step."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    items: list[int] = Field(min_length=2, max_length=2)
    """How many tasks are planted in a document, from and to."""


class Architecture(Strict):
    """A Llama: tied embeddings, grouped-query attention."""

    hidden_size: int = Field(ge=32)
    """Model dimension."""
    num_layers: int = Field(ge=1)
    """Decoder layers."""
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int = Field(ge=1)
    """KV heads."""
    head_dim: int = Field(ge=8)
    """Dimension of a head."""
    intermediate_size: int = Field(ge=32)
    """Inner dimension of the MLP."""
    context: int = Field(ge=64)
    """Longest text in tokens."""
    rope_theta: float = Field(default=100000.0, gt=0.0)
    """Base of the rotary frequencies."""


class PretrainRecipe(Strict):
    """`dms pretrain`: make a small language model and its tokenizer from the built-in source."""

    output_dir: str
    """The folder to write; repeated, the command continues there."""
    vocab_size: int = Field(ge=1024)
    """Tokens of the tokenizer that is trained."""
    architecture: Architecture
    stages: list[PretrainStage] = Field(min_length=1)
    optimizer: Optimizer
    answer_weight: float = Field(default=4.0, gt=0.0)
    """Loss weight of answers; running text has 1."""
    planted_weight: float = Field(default=0.3, ge=0.0)
    """Loss weight of planted names and values, which cannot be predicted."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast to bfloat16."""
    compile: bool = False
    """Whether the model runs under torch.compile."""
    seed: int = 0
    """Of data and initialisation."""
    save_minutes: float = Field(default=5.0, gt=0.0)
    """Minutes between checkpoints; the same command continues from the last one."""
    evaluation: Evaluation = Evaluation()


class GenerateRecipe(Strict):
    """`dms generate-data`: the dense model's own completions of given prompts, as a file to retrofit it on."""

    model: str
    """A folder, a hub id, a GGUF file (FOLDER/FILE.gguf, or HUB-ID:FILE.gguf), or `builtin:tiny`."""
    output: str
    """The JSONL file; a record has prompt, completion, text (both), finish_reason, the counts of tokens, and its number."""
    prompts: Prompts
    num_prompts: int | None = Field(default=None, ge=1)
    """None: every prompt of the source, once (not with builtin)."""
    samples: int = Field(default=1, ge=1)
    """Completions of each prompt."""
    max_new_tokens: int = Field(ge=1)
    """Most tokens of a completion."""
    temperature: float = Field(default=1.0, ge=0.0)
    """0: the most probable token each time."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the most probable tokens that make up this share of the distribution."""
    batch_size: int = Field(default=16, ge=1)
    """Completions at a time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: as the model is saved, on a CPU fp32."""
    seed: int = 0
    """Of sampling."""
    bad_shards: Literal["refuse", "skip"] = "refuse"
    """A file or record that cannot be read: an error that names it, or left out and counted."""
    overwrite: bool = False
    """Replace what another recipe wrote to `output`. Without it, that is refused."""

    @model_validator(mode="after")
    def _check(self):
        if self.output.lower().endswith(SUFFIXES):
            raise ValueError(
                f"output '{self.output}' has the suffix of a compressed file, and the file is written uncompressed; name a .jsonl file"
            )
        if self.prompts.source == "builtin" and self.num_prompts is None:
            raise ValueError("num_prompts is missing: built-in documents never end")
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise ValueError("samples and top_p have no effect with temperature 0: every completion would be the same; remove them")
        return self
