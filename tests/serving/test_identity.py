"""Through vLLM's engine every request gets the tokens that `dms.load(...).generate` gives it alone, whatever runs beside it, and all is given back.

An engine takes its time to start, so that each has several things to do.
"""

from dataclasses import dataclass, field

import pytest
import torch
from served import GIVEN, dense_bytes, logits_of, make_borrowed_folder, make_sliding_folder, prompts, random_ids, reference, run_engine

import dms

# Prompts within a window, about a chunk, and of several.
MIXED = {"prompts": prompts((3, 15, 40, 100, 150, 255, 256, 257, 400, 700, 900, 1200)), "max_tokens": 48}
# One each step; of the three that are aborted one reads its prompt then, and one decodes.
ABORTED = MIXED | {"arrive": list(range(12)), "abort": {4: 9, 8: 30, 11: 14}}
CROWD = {"prompts": prompts(tuple(150 + 23 * number for number in range(20)), seed=1), "max_tokens": 64}
# Those that come later go first, and may preempt one that the same step was to read.
URGENT = CROWD | {"arrive": [2 * number for number in range(20)], "priority": {str(number): -number for number in range(20)}}
# The same, which begin from what was kept of them; some are aborted while they wait, read and decode.
CROWD_AGAIN = CROWD | {"abort": {2: 30, 5: 3, 17: 2, 19: 25}}
_SYSTEM = prompts((700,), seed=2)[0]
# One after another: only what has ended, or is being read, is there to begin from.
SHARED = {"prompts": [_SYSTEM + question for question in prompts((5, 20, 90, 150), seed=3)], "max_tokens": 24, "alone": True}
# All that come while the first one is read wait for no prefix that the same step makes.
TOGETHER = SHARED | {"alone": False, "arrive": [0, 1, 2, 3]}
NEXT_TURN = {"goes_on": 0, "more": prompts((30, 31, 32, 33), seed=4), "max_tokens": 24}
AMPLE = {"tokens": 20_000, "max_model_len": 1400}
# A little more than one request, and they are twenty.
TIGHT = {"tokens": 850, "max_model_len": 680}


@dataclass(frozen=True)
class Case:
    chunk: int
    acts: tuple[dict, ...]
    memory: dict = field(default_factory=lambda: AMPLE)
    options: dict = field(default_factory=dict)
    kv_cache_dtype: str = "auto"
    prefill_chunk: int | None = None
    """Of the reference."""
    ranks: int = 1
    policy: str = "fcfs"

    def ask(self, folder) -> dict:
        engine = {
            "model": str(folder),
            "dtype": "float32",
            "max_model_len": self.memory["max_model_len"],
            "kv_cache_memory_bytes": dense_bytes(folder, self.memory["tokens"]),
            "max_num_batched_tokens": self.chunk,
            "max_num_seqs": 24,
            "kv_cache_dtype": self.kv_cache_dtype,
            "additional_config": {"dms": self.options},
            "tensor_parallel_size": self.ranks,
            "scheduling_policy": self.policy,
        }
        return {"engine": engine, "acts": [dict(act) for act in self.acts]}


CASES = {
    "ample": Case(chunk=256, acts=(SHARED, NEXT_TURN, MIXED, ABORTED)),
    "tight": Case(chunk=128, acts=(CROWD, CROWD_AGAIN), memory=TIGHT),
    "tight, no prefixes, small vouchers": Case(
        chunk=64, acts=(CROWD,), memory=TIGHT, options={"prefix_every": 0, "pages_per_voucher": 1, "page_size": 32}
    ),
    # Steps end between the places where prefixes are kept, so that one may be made, and a request begin, in the same step.
    "together": Case(chunk=200, acts=(TOGETHER, CROWD), options={"prefix_every": 100}),
    "priority": Case(chunk=300, acts=(URGENT, URGENT), memory=TIGHT, options={"prefix_every": 50}, policy="priority"),
    "loops": Case(chunk=200, acts=(SHARED, NEXT_TURN, MIXED, ABORTED), options={"loops": True, "page_size": 32, "prefix_every": 100}),
    "loops, tight": Case(chunk=128, acts=(CROWD,), memory=TIGHT, options={"loops": True}),
    "whole prompts": Case(chunk=8192, acts=(MIXED,), options={"page_size": 64, "prefix_every": 0}),
    "evict_bias": Case(chunk=96, acts=(MIXED,), options={"evict_bias": 0.4}),
    # One KV head each, so that they fill unequally.
    "two ranks": Case(chunk=256, acts=(SHARED, NEXT_TURN, MIXED, ABORTED), ranks=2),
    # A later piece of a prompt reads what fewer bits made of an earlier one, so that pieces must be the same: the engine's end where prefixes are
    # kept, and requests that are preempted and read again would be others.
    "int8": Case(chunk=8192, acts=(SHARED, MIXED), kv_cache_dtype="int8_per_token_head", prefill_chunk=256),
    "int4": Case(chunk=8192, acts=(SHARED, MIXED), options={"kv_dtype": "int4"}, prefill_chunk=256),
}
FAST = {("one", "ample"), ("three", "tight")}


PARAMETERS = [
    pytest.param(name, case, marks=[] if (name, case) in FAST else pytest.mark.slow)
    for name in ("one", "three", "next", *GIVEN)
    for case in CASES
]


@pytest.mark.parametrize(("name", "case"), PARAMETERS)
def test_tokens_are_those_of_generate(name, case, folders, tmp_path):
    folder, chosen = folders(name), CASES[case]
    answers = run_engine(tmp_path, chosen.ask(folder), **{"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if chosen.ranks > 1 else {})
    expected = reference(
        folder,
        chosen.options.get("evict_bias", 0.0),
        "int8" if chosen.kv_cache_dtype != "auto" else chosen.options.get("kv_dtype"),
        chosen.prefill_chunk,
    )
    for number, (act, answer) in enumerate(zip(chosen.acts, answers["acts"], strict=True)):
        aborted = act.get("abort", {})
        assert {n for n, tokens in enumerate(answer["tokens"]) if tokens is None} == set(aborted), "only what was aborted did not finish"
        other = [
            len(prompt)
            for prompt, tokens in zip(answer["prompts"], answer["tokens"], strict=True)
            if tokens is not None and tokens != expected(prompt, act["max_tokens"])
        ]
        assert not other, f"act {number}: requests with prompts of {other} tokens have other tokens than generate gives"
        if act is SHARED:
            assert answer["cached"][0] == 0 and min(answer["cached"][1:]) >= 256
        if act is NEXT_TURN:
            # All that the turn before it had, but its last token, which was never read.
            assert answer["cached"] == [len(p) - len(more) - 1 for p, more in zip(answer["prompts"], act["more"], strict=True)]
    if case == "tight":
        assert sum(answer["preempted"] for answer in answers["acts"]) > 0
    end = answers["end"]
    print(f"{name}, {case}: {end}, preempted {[answer['preempted'] for answer in answers['acts']]}")
    assert end["free"] == end["vouchers"] and end["held"] == end["left"] == 0 and end["peak"] <= end["vouchers"]
    if chosen.ranks == 1:
        assert end["used"] == 0 and end["peak_pages"] <= end["pages"]
    assert (end["prefixes"] > 0) == (chosen.options.get("prefix_every") != 0)


@pytest.mark.slow
def test_layers_that_slide_lie_beside_those_with_gates(tmp_path):
    folder = make_sliding_folder(tmp_path)
    act = {"prompts": [random_ids(length, seed=length) for length in (3, 8, 9, 40, 100, 200, 300)], "max_tokens": 32}
    case = Case(chunk=64, acts=(act, act), memory={"tokens": 4000, "max_model_len": 400}, options={"prefix_every": 64})
    ask = case.ask(folder)
    answers = run_engine(tmp_path, {**ask, "engine": ask["engine"] | {"skip_tokenizer_init": True}})
    expected = reference(folder)
    for answer in answers["acts"]:
        assert answer["tokens"] == [expected(prompt, 32) for prompt in act["prompts"]]
    assert answers["acts"][1]["cached"][-1] >= 256
    assert answers["end"]["free"] == answers["end"]["vouchers"] and answers["end"]["used"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "family", "ranks"),
    [("borrowed_once", "llama", 1), ("borrowed", "qwen3", 2), ("borrowed", "phi3", 1), ("borrowed", "qwen2", 1)],
)
def test_borrowed_gates(gate, family, ranks, tmp_path):
    """The queries' projection is fused with the others' where it was not, and phi3's is so by itself; qwen3's channel is read after a norm."""
    folder = make_borrowed_folder(tmp_path, gate, family)
    act = {"prompts": [random_ids(length, seed=length) for length in (3, 9, 40, 100, 200, 300)], "max_tokens": 32}
    case = Case(chunk=64, acts=(act, act), memory={"tokens": 4000, "max_model_len": 400}, options={"prefix_every": 64}, ranks=ranks)
    ask = case.ask(folder)
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {}
    answers = run_engine(tmp_path, {**ask, "engine": ask["engine"] | {"skip_tokenizer_init": True}}, **env)
    expected = reference(folder)
    for answer in answers["acts"]:
        assert answer["tokens"] == [expected(prompt, 32) for prompt in act["prompts"]]
    assert answers["end"]["free"] == answers["end"]["vouchers"] and 2 < answers["end"]["peak"] < answers["end"]["vouchers"]
    kept = (logits_of(expected.model, torch.tensor([act["prompts"][-1]])) <= 0).float().mean()
    assert 0.2 < kept < 0.7, "they evict, and not everything"


@pytest.mark.parametrize("name", ["one", "three"])
def test_random_gates_evict_as_trained_ones_do(name, folders):
    """Else the tests above would say little."""
    model = dms.load(folders(name), dtype="float32", device="cpu")
    kept = (logits_of(model, torch.tensor([prompts((800,), seed=5)[0]])) <= 0).float().mean((0, 1))
    assert 2.5 < 1 / kept.mean().item() < 5
    assert kept.max() > 2.5 * kept.min()
