"""Runs one vLLM engine in this process: `engine.py ASKS.json ANSWERS.json`. Not a test; tests/helpers/served.py starts it.

ASKS: `engine`, the arguments of vllm.LLM; `acts`, a list of what to do with it, one after another. An act has `max_tokens` and
- `prompts`: lists of tokens, or `goes_on`: the number of an act whose prompts and answers, and `more`, are this one's prompts;
- `arrive`: at which step each comes (all at the first), `priority`: of each (0), `abort`: {number of a prompt: step} (none), `alone`: one after another (together).
ANSWERS: of each act `prompts`, `tokens`, `cached` and `preempted`, and `end`: what the engine held after all.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    asks, answers = map(Path, sys.argv[1:])
    given = json.loads(asks.read_text())

    from vllm import LLM

    llm = LLM(enforce_eager=True, disable_log_stats=True, **given["engine"])
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = count_calls(scheduler, "_preempt_request")
    done: list[dict] = []
    for number, act in enumerate(given["acts"]):
        before = len(preempted)
        if "goes_on" in act:
            last = done[act["goes_on"]]
            act["prompts"] = [p + t + m for p, t, m in zip(last["prompts"], last["tokens"], act["more"], strict=True)]
        done.append(act_out(llm.llm_engine, str(number), act) | {"preempted": len(preempted) - before})
    answers.write_text(json.dumps({"acts": done, "end": end(llm, scheduler)}))


def count_calls(owner, name: str) -> list[None]:
    """Grows by one with each call of a method."""
    calls: list[None] = []
    method = getattr(owner, name)

    def counting(*args, **kwargs):
        calls.append(None)
        return method(*args, **kwargs)

    setattr(owner, name, counting)
    return calls


def act_out(engine, name: str, act: dict) -> dict:
    from vllm import SamplingParams

    prompts = act["prompts"]
    arrive = act.get("arrive") or [0] * len(prompts)
    abort = {int(number): step for number, step in act.get("abort", {}).items()}
    waiting, outputs, step = list(range(len(prompts))), {}, 0
    while waiting or engine.has_unfinished_requests():
        free = not (act.get("alone") and engine.has_unfinished_requests())
        for number in [n for n in waiting if arrive[n] <= step and free][: 1 if act.get("alone") else None]:
            waiting.remove(number)
            sampling = SamplingParams(temperature=0, max_tokens=act["max_tokens"], ignore_eos=True)
            priority = act.get("priority", {}).get(str(number), 0)
            engine.add_request(f"{name}-{number}", {"prompt_token_ids": prompts[number]}, sampling, priority=priority)
        for number in [n for n, at in abort.items() if at == step]:
            engine.abort_request([f"{name}-{number}"])
        for output in engine.step():
            outputs[output.request_id] = output
        step += 1
    found = [outputs.get(f"{name}-{number}") for number in range(len(prompts))]
    return {
        "prompts": prompts,
        "tokens": [list(one.outputs[0].token_ids) if one and one.finished else None for one in found],
        "cached": [one.num_cached_tokens if one else None for one in found],
        "steps": step,
    }


def end(llm, scheduler) -> dict:
    """What is held when all requests have ended, prefixes are dropped, and one step more has told the workers."""
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool = manager.block_pool
    vouchers = pool.num_gpu_blocks - 1
    prefixes = len(manager.prefixes.by_name)
    manager._make_room(vouchers)
    found = {
        "vouchers": vouchers,
        "free": pool.get_num_free_blocks(),
        "held": manager.ledger.num_held,
        "prefixes": prefixes,
        "left": len(manager.prefixes.by_name) + len(manager.requests) + len(manager.names) + len(manager.further),
        "peak": manager.peak,
        "kept": manager.ledger.kept,
    }
    # Less than a ring: a request without pages.
    act_out(llm.llm_engine, "last", {"prompts": [[5, 6, 7]], "max_tokens": 2})
    try:
        context = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.compilation_config.static_forward_context
    except AttributeError:
        # Several ranks, each in a process of its own.
        return found
    worker = context["model.layers.0.dms_pool"].worker
    return found | {
        "pages": worker.pool.num_pages,
        "used": int(worker.pool.num_used),
        "peak_pages": worker.peak_pages,
        "peak_requests": worker.peak_requests,
    }


if __name__ == "__main__":
    main()
