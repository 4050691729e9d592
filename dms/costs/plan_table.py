"""A plan as a person reads it."""

from rich import box
from rich.console import Console
from rich.table import Table

from dms.costs.job import Job
from dms.costs.plan import Plan, PlannedChoice, recipe_lines

_GB = 1e9
_WIDE = 136
_LEGEND = (
    "* recommended, = the recipe's own, x does not fit. zero: stage, and what rests in host memory. act.: activations are kept, "
    "checkpointed, or their checkpoints rest in host memory. other: buffers, and a reserve for what is not tensors. peak: less than the "
    "sum, since not all is there at once. eval: the run's own evaluation. host: of a node."
)


def show(console: Console, name: str, plan: Plan) -> None:
    """Print a plan: what is to be done, what each choice takes, and the recommended one as recipe lines."""
    for line in _facts(name, plan):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_choices_table(plan), highlight=False)
    console.print(_LEGEND, highlight=False, markup=False)
    console.print(_conclusion(plan), highlight=False, markup=False, soft_wrap=True)


def _facts(name: str, plan: Plan) -> list[str]:
    job, shape, flops = plan.job, plan.shape, plan.flops
    step = job.batch_size * job.length
    return [
        f"[bold]{name}[/]: {shape.name}, {shape.parameters:,} parameters, {plan.trained:,} trained ({shape.gates:,} in gates on "
        f"{shape.num_gated} of {len(shape.layers)} layers)",
        f"{job.steps} steps of {job.batch_size} x {job.length:,} tokens = {job.tokens:,}; {plan.num_gpus} x {plan.gpu.name}",
        f"a step of {step:,} tokens: {flops.total:.3g} FLOPs, of which teacher {_share(flops.teacher + flops.teacher_attention, flops.total)}, "
        f"student {_share(flops.student + flops.student_attention, flops.total)}, recomputation "
        f"{_share(flops.recomputed + flops.recomputed_attention, flops.total)}, backward {_share(flops.backward + flops.backward_attention, flops.total)}, "
        f"loss {_share(flops.loss, flops.total)}; attention in all {_share(flops.attention, flops.total)}",
        f"the loss has {plan.loss_rows:,} rows of logits alive at once",
        *_lifetimes(job),
        *_warm_up(job),
        *_packed(plan),
    ]


def _lifetimes(job: Job) -> list[str]:
    """With several windows: what attention is reckoned with."""
    if len(job.windows) == 1:
        return []
    found = job.mean_lifetimes
    leave = ", ".join(f"{share:.0%} after {window:,}" for share, window in zip(found.leave, found.windows, strict=True))
    return [f"assumed of tokens, in the mean over the steps: {leave}, and {found.stay:.0%} stay (a target says how many, gates say which)"]


def _warm_up(job: Job) -> list[str]:
    if job.warm_up_steps == 0:
        return []
    return [
        f"{job.warm_up_steps} of the steps are those of warm_start: one dense pass and attention scores, about a third of another step; they are "
        "counted as whole steps here"
    ]


def _packed(plan: Plan) -> list[str]:
    """Of a quantised base: what is packed, what is not, and what the estimate takes for granted."""
    shape, packing = plan.shape, plan.shape.packing
    if packing is None:
        return []
    rest = shape.parameters - shape.num_packed
    whole = "in the backward" if packing.product == "int8" else "for each product"
    lines = [
        f"the base is packed: {_count(shape.num_packed)} of its parameters as {packing.name} in {_gb(shape.packed_bytes)} GB, scales included, and "
        f"{_count(rest)} whole (embeddings, head, norms); a matrix is dequantised {whole}: seconds count that it is written and read in whole, "
        "not what unpacking computes"
    ]
    if packing.product == "int8":
        lines.append("int8 products keep their inputs for the backward, which activation checkpointing and offload do not change")
    return lines


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"


def _choices_table(plan: Plan) -> Table:
    width = plan.shown.choice.sequence_parallel
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"GB of each GPU by kind, sequence_parallel {width}"
    table.add_column("zero", no_wrap=True)
    table.add_column("act.", no_wrap=True)
    kinds = ("weights", "act.", "ckpt", "loss", "grad", "opt", "other")
    for name in (*kinds, "peak", "eval", "host", "s/step", "limit", "GPU h"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in plan.outcomes:
        if outcome.choice.sequence_parallel == width:
            table.add_row(*_row(plan, outcome), style=_style(plan, outcome))
    return table


def _row(plan: Plan, outcome: PlannedChoice) -> list[str]:
    used = outcome.bytes
    mark = ("*" if outcome is plan.recommended else "") + ("=" if plan.own and outcome.choice == plan.own.choice else "")
    kinds = (used.weights, used.activations, used.checkpoints, used.loss, used.gradients, used.optimizer)
    numbers = [_gb(value) for value in (*kinds, used.buffers + used.reserve, used.peak, used.evaluation, used.host)]
    numbers[7] += "" if outcome.fits else "x"
    numbers[8] += "" if used.evaluation <= plan.gpu.memory else "x"
    return [
        f"{outcome.choice.zero} {mark}".rstrip(),
        outcome.choice.activations,
        *numbers,
        _short(outcome.seconds.total),
        outcome.seconds.limit,
        _short(outcome.gpu_hours),
    ]


def _count(number: float) -> str:
    size, unit = next((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K"), (1, "")) if number >= size or size == 1)
    return f"{number / size:.3g}{unit}"


def _gb(value: float) -> str:
    return _short(value / _GB)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def _style(plan: Plan, outcome: PlannedChoice) -> str:
    return "bold" if outcome is plan.recommended else "" if outcome.fits else "dim"


def _conclusion(plan: Plan) -> str:
    if plan.recommended is None:
        least = min(plan.outcomes, key=lambda outcome: outcome.bytes.peak)
        return (
            f"nothing fits {plan.gpu.name} ({plan.gpu.memory / _GB:.0f} GB): the least is {least.bytes.peak / _GB:.1f} GB, with zero {least.choice.zero}, "
            f"activations {least.choice.activations}; take more GPUs (--num), a larger one (--gpu), {_narrower(plan)}or a shorter data.length"
        )
    lines = "\n".join(f"    {line}" for line in recipe_lines(plan))
    return f"recommended, as recipe lines ({_short(plan.recommended.gpu_hours)} GPU hours without evaluation):\n{lines}"


def _narrower(plan: Plan) -> str:
    """A kind of quantisation that takes less, where one may, and what keeps ZeRO away."""
    packing = plan.shape.packing
    first = "" if plan.job.warm_up_steps == 0 else "warm_start=null, with which ZeRO goes, "
    if plan.job.trainable == "all" or (packing is not None and packing.bits <= 4):
        return first
    return first + ("a base in 4 bits (quantize=nf4), " if packing is None or packing.product == "int8" else "")


def overview(console: Console, plans: dict[str, Plan]) -> None:
    """Several recipes' recommended choices, a row each."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("recipe", no_wrap=True)
    figures = ("param", "trained", "tokens", "FLOPs", "zero", "act.", "sp", "peak", "eval", "host", "s/step", "limit", "GPU h")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    for name, plan in plans.items():
        start = [name, *(_count(number) for number in (plan.shape.parameters, plan.trained, plan.job.tokens))]
        start.append(f"{plan.flops.total * plan.job.steps:.1e}")
        best = plan.recommended
        if best is None:
            table.add_row(*start, "nothing fits", *["-"] * 8)
            continue
        used = [_gb(value) for value in (best.bytes.peak, best.bytes.evaluation, best.bytes.host)]
        used[1] += "" if best.bytes.evaluation <= plan.gpu.memory else "x"
        where = [best.choice.zero, best.choice.activations, str(best.choice.sequence_parallel)]
        table.add_row(*start, *where, *used, _short(best.seconds.total), best.seconds.limit, _short(best.gpu_hours))
    # Names and figures in whole: a narrow terminal wraps, a file does not.
    whole = console if console.width >= _WIDE else Console(width=_WIDE, file=console.file)
    whole.print(table, highlight=False)
    console.print(
        "peak, eval, host: GB, of a GPU in training and in the run's own evaluation, and of a node. sp: sequence_parallel.", soft_wrap=True
    )
