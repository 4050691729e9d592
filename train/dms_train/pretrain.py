"""`dms pretrain`: the embedded model and its tokenizer, from the standard library's sources and planted tasks."""

import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dms.console import make_console
from dms.errors import writing
from dms.evaluation.data.names import FIRST_WORDS, SECOND_WORDS, VALUES
from dms.evaluation.data.tasks import DISTRACTOR, EVENT, QUESTION, RECORD, make_document
from dms.evaluation.data.text_sources import StdlibText, stdlib_files
from dms.evaluation.engine.run_end import make_documents, read_dense
from dms.evaluation.stats.collect import RunFigures, collect
from dms.evaluation.stats.rows import describe_device, versions
from dms_train.recipe import PretrainRecipe, PretrainStage
from dms_train.recipe_file import dump_recipe
from dms_train.step import learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(vocab_size: int, context: int):
    """A byte-level BPE of the training files, with one token for each word of a planted name, each value and each marker."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    planted = [f" ${word}" for word in FIRST_WORDS] + [f"-{word}" for word in SECOND_WORDS] + [f" {value}" for value in VALUES]
    planted += [RECORD, QUESTION, EVENT, DISTRACTOR]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(planted),
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(held_out=False)), trainer)
    # Documents are made of lines that are tokenised each by itself: a text read as a whole must come out the same, its line ends apart
    # from the next line's indentation. The vocabulary was learnt without that.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "merged_with_previous"), tokenizer.pre_tokenizer])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in planted])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


_LOG_EVERY = 50


class WeightedDocuments(Dataset):
    """Documents of one stage, by number: token ids, loss weights and roles, [T] each."""

    def __init__(self, tokenizer, recipe: PretrainRecipe, stage: PretrainStage, first: int):
        self.tokenizer, self.recipe, self.stage, self.first = tokenizer, recipe, stage, first
        self.text = StdlibText(held_out=False)
        self.weights = torch.tensor([1.0, recipe.planted_weight, recipe.answer_weight])

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch_size - self.first

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = Random(f"{self.recipe.seed + 1}:{self.stage.length}:{index + self.first}")
        styles: tuple[Literal["anywhere"], Literal["end"]] = ("anywhere", "end")
        style = rng.choice(styles)
        document = make_document(
            self.tokenizer,
            self.text,
            length=self.stage.length,
            rng=rng,
            questions=style,
            num_items=rng.randint(*self.stage.items),
            strict=False,
        )
        role = torch.tensor(document.role)
        return torch.tensor(document.input_ids), self.weights[role], role


def build_model(recipe: PretrainRecipe, vocab_size: int) -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = recipe.architecture
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.context,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            use_cache=False,
        )
    )


def weighted_loss(
    model: nn.Module, ids_BT: torch.Tensor, weight_BT: torch.Tensor, role_BT: torch.Tensor, autocast: bool
) -> tuple[torch.Tensor, ...]:
    """Cross-entropy of the next token: the weighted mean, and the means over running text and over answers."""
    with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids_BT).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")
    weight, role = weight_BT[:, 1:].flatten(), role_BT[:, 1:].flatten()
    parts = [(nll.detach() * (role == kind)).sum() / (role == kind).sum() for kind in (0, 2)]
    return (nll * weight).sum() / weight.sum(), *parts


@dataclass
class PretrainState:
    """Where pre-training stands; in the checkpoint as a dictionary."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    loss: float | None = None
    """As last printed."""


def run(recipe: PretrainRecipe, console: Console | None = None) -> dict:
    """Train, save as a Hugging Face folder in half precision, evaluate, and write the card.

    Raises:
        ValueError: an output folder that holds something else, or a checkpoint of another recipe.
        FloatingPointError: a loss that is not finite, with its step.
    """
    console = console or make_console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(recipe.output_dir)
    checkpoint = folder / "checkpoint.pt"
    if folder.exists() and any(folder.iterdir()) and not checkpoint.is_file():
        raise ValueError(f"output_dir {recipe.output_dir!r} is not empty and holds no checkpoint of this command; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.vocab_size, recipe.architecture.context)
    model = build_model(recipe, len(tokenizer))
    # transformers' own `to` loses its signature in a wrapper.
    nn.Module.to(model, device)
    optimizer = _make_optimizer(model, recipe)
    state = PretrainState()
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        if saved["recipe"] != dump_recipe(recipe):
            raise ValueError(f"{checkpoint} belongs to another recipe; choose another output_dir or delete it")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = PretrainState(**saved["state"])
        console.print(f"continuing from step {state.step}", highlight=False)
    _train(recipe, model, tokenizer, optimizer, state, checkpoint, console)
    return finish(folder, recipe, model, tokenizer, state, console)


def _make_optimizer(model: nn.Module, recipe: PretrainRecipe) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    beta1, beta2 = settings.betas
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(beta1, beta2),
        fused=True,
    )


def _train(
    recipe: PretrainRecipe,
    model: nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: PretrainState,
    checkpoint: Path,
    console: Console,
) -> None:
    """Take the steps that remain, save every few minutes, and update `state`."""
    settings, device = recipe.optimizer, next(model.parameters()).device
    total = sum(stage.steps for stage in recipe.stages)
    console.print(f"pre-training {sum(p.numel() for p in model.parameters()):,} parameters for {total} steps on {device}", highlight=False)
    begun, last_save, before, first = time.perf_counter(), time.perf_counter(), state.seconds, state.step
    for batch, loss_function in _batches(recipe, tokenizer, state.step):
        lr = learning_rate(state.step + 1, steps=total, lr=settings.lr, warmup_steps=settings.warmup_steps, final_lr=settings.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, *parts = loss_function(model, *(tensor.to(device) for tensor in batch), recipe.precision == "bf16")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += batch[0].numel()
        state.seconds = before + time.perf_counter() - begun
        if state.step % _LOG_EVERY == 0 or state.step == total:
            # Only here: each reading of the loss waits for the device.
            state.loss = loss.item()
            if not math.isfinite(state.loss):
                raise FloatingPointError(f"the loss is not finite at step {state.step}; lower optimizer.lr")
            left = (total - state.step) * (time.perf_counter() - begun) / (state.step - first)
            console.print(
                f"step {state.step}/{total}  length {batch[0].shape[1]}  loss {state.loss:.3f} (text {parts[0]:.3f}, answers {parts[1]:.3f})  "
                f"{state.tokens / state.seconds:,.0f} tok/s  about {left / 60:.0f} min left",
                highlight=False,
            )
        if time.perf_counter() - last_save > 60 * recipe.save_minutes:
            _save(checkpoint, recipe, model, optimizer, state)
            last_save = time.perf_counter()
    _save(checkpoint, recipe, model, optimizer, state)


def _save(checkpoint: Path, recipe: PretrainRecipe, model: nn.Module, optimizer: torch.optim.Optimizer, state: PretrainState) -> None:
    content, unnamed = io.BytesIO(), checkpoint.with_suffix(".new")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": asdict(state), "recipe": dump_recipe(recipe)}, content
    )
    # Through memory: of a full disk, torch would only report an unexpected position.
    with writing(unnamed):
        unnamed.write_bytes(content.getbuffer())
    unnamed.replace(checkpoint)


def _batches(recipe: PretrainRecipe, tokenizer, done: int) -> Iterator[tuple]:
    """The remaining batches of all stages, each with the loss function compiled for its length."""
    for stage in recipe.stages:
        skipped = min(done, stage.steps)
        done -= skipped
        if skipped == stage.steps:
            continue
        torch.compiler.reset()
        loss_function = torch.compile(weighted_loss) if recipe.compile else weighted_loss
        documents = WeightedDocuments(tokenizer, recipe, stage, first=skipped * stage.batch_size)
        for batch in DataLoader(documents, batch_size=stage.batch_size, num_workers=1):
            yield batch, loss_function


def finish(folder: Path, recipe: PretrainRecipe, model: "PreTrainedModel", tokenizer: Any, state: PretrainState, console: Console) -> dict:
    """Save in half precision and measure what was saved."""
    from dms.config import DMSConfig
    from dms.io.base_models import load_base
    from dms.io.weights import follow_umask, weight_files
    from dms.report.cards import write_pretrain_card
    from dms.retrofitting import retrofit

    for config in (model.config, model.generation_config):
        config.use_cache = True
    saved = folder / "model"
    model.half().save_pretrained(saved)
    follow_umask(*weight_files(saved))
    tokenizer.save_pretrained(saved)
    settings = recipe.evaluation
    length = settings.length or recipe.architecture.context
    documents = make_documents(tokenizer, num_documents=settings.num_documents, length=length, num_items=settings.num_items)
    # The evaluation reads a retrofitted model; in dense mode that is the model itself.
    dense = retrofit(load_base(str(saved), "float32"), DMSConfig(window=0))
    measured = read_dense(dense, documents, batch_size=settings.batch_size)
    figures = RunFigures.of("dense", collect([measured]))
    shape = recipe.architecture
    facts = {
        "architecture": f"Llama, {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "context": shape.context,
        "vocabulary": len(tokenizer),
        "num_files": len(stdlib_files(held_out=False)),
        "length": length,
        "tokens": state.tokens,
        "steps": state.step,
        "loss": state.loss,
        "seconds": state.seconds,
        "device": describe_device(),
        "versions": versions(),
        "results": figures.to_dict(),
    }
    write_pretrain_card(saved, facts)
    (folder / "result.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    console.print(
        f"recall {figures.recall:.3f} over {figures.recall_questions} questions at {length} tokens, by distance {figures.recall_by_distance}",
        highlight=False,
    )
    console.print(f"bits per byte {figures.bits_per_byte:.4f}; by task {figures.by_task}; wrote {saved}", highlight=False)
    return facts
