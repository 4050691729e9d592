"""What the console shows while a run goes on."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dms.io.quantization import packed_tensors, quant_method
from dms.modes import state_of
from dms.report.charts import window_name
from dms.training.sharding import num_elements, resident_bytes
from dms_train.models import Models
from dms_train.recipe import RetrofitRecipe
from dms_train.step_metrics import StepMetrics

# What a target ratio is of.
_OF_BUDGET = {"decided": "of decisions", "end": "of entries at a document's end", "mean": "of entries in the mean"}


def describe_start(console: Console, recipe: RetrofitRecipe, parts: Models, num_trained: int) -> None:
    student: Any = parts.student
    state = state_of(student)
    packed = packed_tensors(student)
    # A byte may hold the codes of two parameters, which transformers knows.
    total = student.num_parameters() if packed else sum(num_elements(p) for p in student.parameters())
    console.print(
        f"[bold]{recipe.model}[/]: gates on {len(state.layers)} layers of {state.layers[0].num_heads} KV heads, "
        f"training {num_trained:,} of {total:,} parameters, target CR {recipe.target_cr:g} ({_OF_BUDGET[recipe.budget]}), "
        f"window {window_name(recipe.dms.window)}",
        highlight=False,
    )
    if packed:
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        console.print(f"  packed weights ({recipe.quantize or quant_method(student.config)}): {num_bytes:,} bytes, frozen", highlight=False)
    if recipe.zero.stage == 3:
        for whose, model in (("", student), ("the teacher's ", parts.teacher)):
            if model is not None:
                whole = sum(num_elements(p) * p.element_size() for p in model.parameters())
                console.print(f"  of {whose}{whole:,} bytes of weights the first process holds {resident_bytes(model):,}", highlight=False)
    for name, reason in state.skipped.items():
        console.print(f"  without gates: {name}: {reason}", highlight=False)


class LiveLine:
    """A progress bar on a terminal; elsewhere its subclasses print a plain line every `every` items."""

    def __init__(self, console: Console, what: str, total: int | None, done: int):
        """total: None where it is not known."""
        self.console = console
        self.every = max(1, (total or 0) // 20)
        self.progress = Progress(
            TextColumn(f"{what} {{task.completed}}" + (f"/{total}" if total else "")),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total, completed=done, text="")

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()


class StepLine(LiveLine):
    """The progress of training."""

    def __init__(self, console: Console, steps: int, done: int = 0):
        super().__init__(console, "step", steps, done)
        self.steps = steps

    def update(self, metrics: StepMetrics) -> None:
        loss = f"labels {metrics.loss:.4f}" if metrics.kl is None else f"kl {metrics.kl:.4f}"
        text = f"{loss}  cr {metrics.cr:.2f} of {metrics.target_cr:.2f}  {metrics.tokens_per_second:,.0f} tok/s"
        self.progress.update(self.task, advance=1, text=text)
        step = metrics.step
        if not self.console.is_terminal and (step % self.every == 0 or step in (1, self.steps)):
            left = (self.steps - step) * metrics.seconds
            self.console.print(f"step {step}/{self.steps}  {text}  eta {left:.0f} s", highlight=False)
