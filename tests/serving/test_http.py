"""`dms serve` as its users meet it: over HTTP, with the openai client."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import dense_bytes, environment, prompts, reference

openai = pytest.importorskip("openai")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MIXED = prompts((3, 15, 40, 100, 150, 255, 256, 257, 400, 600), seed=6)


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """Its address; it runs as long as this module's tests."""
    folder, said = folders("three"), tmp_path_factory.mktemp("server") / "said.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--max-model-len": 1200,
        "--kv-cache-memory-bytes": dense_bytes(folder, 6000),
        "--max-num-batched-tokens": 256,
        "--chat-template": TEMPLATE,
        "--served-model-name": "tiny",
    }
    words = [str(word) for option in options.items() for word in option]
    with said.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dms_train.cli", "serve", str(folder), "--evict-bias", "0.25", "--enforce-eager", *words],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + 600
            while not _answers(address):
                assert process.poll() is None and time.monotonic() < end, said.read_text()[-6000:]
                time.sleep(0.5)
            yield address
        finally:
            # Its workers are in its session.
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sign)
                    process.wait(20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def metrics(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=20) as reply:
        lines = [line for line in reply.read().decode().splitlines() if line and line[0] != "#"]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def expected(folders):
    return reference(folders("three"), 0.25)


def complete(client, prompt, num_tokens, **more):
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=num_tokens, temperature=0, extra_body=extra, **more)


def test_requests_at_once_get_the_tokens_of_generate(client, expected):
    with ThreadPoolExecutor(len(MIXED)) as threads:
        answers = list(threads.map(lambda prompt: complete(client, prompt, 32).choices[0].token_ids, MIXED))
    assert answers == [expected(prompt, 32) for prompt in MIXED]


def test_a_stream_has_the_same_tokens(client, expected):
    parts = list(complete(client, MIXED[4], 32, stream=True))
    assert len(parts) > 4
    assert [token for part in parts for token in part.choices[0].token_ids] == expected(MIXED[4], 32)


def test_four_answers_of_which_all_begin_from_one_prompt(client):
    reply = client.completions.create(model="tiny", prompt=MIXED[7], max_tokens=12, temperature=1.0, n=4)
    assert sorted(choice.index for choice in reply.choices) == [0, 1, 2, 3] and reply.usage.completion_tokens <= 48
    assert len({choice.text for choice in reply.choices}) > 1
    greedy = complete(client, MIXED[7], 12, n=1).choices[0].text
    assert complete(client, MIXED[7], 12, n=1).choices[0].text == greedy


def test_stop_and_logprobs(client):
    prompt = "def value_index(index, count=3):\n    if index > count:"
    whole = complete(client, prompt, 40, logprobs=3).choices[0]
    assert len(whole.logprobs.tokens) == len(whole.logprobs.token_logprobs) == 40 and max(whole.logprobs.token_logprobs) <= 0
    best = [max(top.values()) for top in whole.logprobs.top_logprobs]
    assert best == pytest.approx(whole.logprobs.token_logprobs, abs=1e-5), "greedy"
    stop = whole.text[8:11]
    stopped = complete(client, prompt, 40, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == whole.text[: whole.text.index(stop)]
    assert whole.finish_reason == "length"


def test_chats_go_on(client):
    messages = [{"role": "system", "content": "def name_path(path):\n" * 40}, {"role": "user", "content": "return path"}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, temperature=0)
    assert first.choices[0].message.role == "assistant" and first.usage.prompt_tokens > 256
    messages += [{"role": "assistant", "content": first.choices[0].message.content or ""}, {"role": "user", "content": "return name"}]
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, temperature=0, stream=True)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, temperature=0)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == whole.choices[0].message.content


def test_a_stream_that_its_reader_leaves_is_ended(client, server, expected):
    before = metrics(server)["vllm:generation_tokens_total"]
    stream = complete(client, MIXED[5], 900, stream=True)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    # The figures are those of the last step, so that there must be one.
    for _ in range(5):
        assert complete(client, MIXED[2], 8).choices[0].token_ids == expected(MIXED[2], 8)
        if metrics(server)["vllm:num_requests_running"] == 0:
            break
    else:
        pytest.fail("it still runs")
    assert metrics(server)["vllm:generation_tokens_total"] - before < 900


def test_the_pool_is_among_vllms_metrics(client, server):
    # Counted once a second.
    time.sleep(1)
    complete(client, MIXED[9], 16)
    found = metrics(server)
    assert 0 <= found["vllm:kv_cache_usage_perc"] <= 1
    assert found["dms:entries_alive"] > 0 and found["dms:live_bytes"] > 0 and found["dms:compression_ratio"] >= 1


def test_a_prompt_too_long_is_the_askers_fault(client):
    with pytest.raises(openai.BadRequestError, match="1200"):
        complete(client, MIXED[9] * 3, 8)


def test_what_does_not_work_is_said_before_a_server_starts(folders):
    words = [sys.executable, "-m", "dms_train.cli", "serve", str(folders("three")), "--pipeline-parallel-size", "2"]
    done = subprocess.run(words, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "pipeline_parallel_size is 2, and the pages of all layers are in one pool" in done.stdout + done.stderr
