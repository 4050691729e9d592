"""Requests at once and tokens a second at equal KV memory: the same folder served with its gates and dense, under `vllm bench serve`.

    .venv-serve/bin/python serve/bench_serving.py FOLDER --text FILE.jsonl --kv-bytes 8000000 --prompt-tokens 1000 --out ROWS.jsonl
    python serve/bench_serving.py FOLDER --text FILE.jsonl --kv-bytes 8000000000 --dtype bfloat16 --prompt-tokens 2048 8192 32768 --num-prompts 1 8 64

Dense is the same folder by vLLM's own model class, which does not see the gates; loops are gates whose requests are read one after another. Prompts are
of the text file's documents ("text" of each line), shorter ones joined. Of requests at once the most that vLLM's metrics said, asked ten times a
second; times to the first token, and between tokens, are medians of `vllm bench serve`. A mode and a length of prompts have a server of their own.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PREEMPTIONS = "vllm:num_preemptions_total"
MODES = ("dense", "gates", "loops")
_MEASURED = ("completed", "duration", "output_throughput", "total_token_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", required=True, help="JSON lines with the documents that prompts are taken from")
    parser.add_argument("--kv-bytes", type=int, required=True, help="memory for the KV cache, of both")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1000])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument(
        "--num-prompts", type=int, nargs="+", default=[48], help="requests that come at once; several are sent one number after another"
    )
    parser.add_argument("--max-model-len", type=int, default=0, help="0: what a prompt and its answer need")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["dense", "gates"])
    parser.add_argument("--out", help="a JSON line for each mode is appended to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for prompt_tokens in options.prompt_tokens:
            prompts = write_prompts(options, prompt_tokens, Path(scratch) / f"prompts-{prompt_tokens}.jsonl")
            for mode in options.modes:
                for row in run(options, mode, prompt_tokens, prompts, Path(scratch)):
                    print(json.dumps(row), flush=True)
                    if options.out:
                        with open(options.out, "a", encoding="utf-8") as f:
                            f.write(json.dumps(row) + "\n")


def write_prompts(options: argparse.Namespace, wanted: int, path: Path) -> Path:
    from transformers import AutoTokenizer

    tokenizer, num_prompts = AutoTokenizer.from_pretrained(options.folder), max(options.num_prompts)
    prompts: list[list[int]] = []
    tokens: list[int] = []
    with open(options.text, encoding="utf-8") as f:
        for line in f:
            tokens += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            while len(tokens) >= wanted and len(prompts) < num_prompts:
                prompts.append(tokens[:wanted])
                tokens = tokens[wanted:]
            if len(prompts) == num_prompts:
                break
    if len(prompts) < num_prompts:
        raise SystemExit(f"{options.text} has {len(prompts)} prompts of {wanted} tokens, and {num_prompts} were asked for")
    with open(path, "w", encoding="utf-8") as f:
        for prompt in prompts:
            f.write(json.dumps({"prompt": tokenizer.decode(prompt), "output_tokens": options.output_tokens}) + "\n")
    return path


def run(options: argparse.Namespace, mode: str, prompt_tokens: int, prompts: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Some more: a decoded prompt may have some tokens more than it was cut to.
    longest = options.max_model_len or prompt_tokens + options.output_tokens + 64
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    serve = [*vllm, "serve", options.folder, "--port", str(port), "--dtype", options.dtype, "--max-model-len", str(longest)]
    serve += ["--kv-cache-memory-bytes", str(options.kv_bytes), "--max-num-seqs", str(options.max_num_seqs), "--no-enable-prefix-caching"]
    serve += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
    if mode == "loops":
        serve += ["--additional-config", json.dumps({"dms": {"loops": True}})]
    # Without plugins the folder's gates are not seen.
    env = {**os.environ, "VLLM_PLUGINS": ""} if mode == "dense" else dict(os.environ)
    log = scratch / f"{mode}.log"
    with open(log, "w") as out, subprocess.Popen(serve, stdout=out, stderr=subprocess.STDOUT, env=env) as server:
        try:
            began = time.monotonic()
            while metrics(port) is None:
                if server.poll() is not None or time.monotonic() - began > 900:
                    raise SystemExit(f"the {mode} server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(1)
            started = time.monotonic() - began
            for num_prompts in options.num_prompts:
                watch = Watch(port)
                bench = [*vllm, "bench", "serve", "--port", str(port), "--model", options.folder, "--dataset-name", "custom"]
                bench += ["--dataset-path", str(prompts), "--custom-output-len", str(options.output_tokens), "--skip-chat-template"]
                bench += ["--num-prompts", str(num_prompts), "--ignore-eos", "--temperature", "0"]
                bench += ["--save-result", "--result-dir", str(scratch), "--result-filename", f"{mode}.json"]
                done = subprocess.run(bench, capture_output=True, text=True)
                seen = watch.stop()
                if done.returncode:
                    raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
                result = json.loads((scratch / f"{mode}.json").read_text())
                yield {
                    "folder": options.folder,
                    "mode": mode,
                    "kv_bytes": options.kv_bytes,
                    "prompt_tokens": prompt_tokens,
                    "output_tokens": options.output_tokens,
                    "num_prompts": num_prompts,
                    "dtype": options.dtype,
                    "start_s": round(started, 1),
                    **seen,
                    **{name: result[name] for name in _MEASURED if name in result},
                }
        finally:
            server.terminate()


def metrics(port: int) -> dict[str, float] | None:
    """The server's gauges and counters by name, without labels; None where it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None
    return {match[1]: float(match[2]) for match in re.finditer(r"^([a-z_:]+)(?:\{.*\})? ([0-9.e+-]+)$", text, re.M)}


class Watch:
    """Asks a server for its metrics until `stop`."""

    def __init__(self, port: int):
        self.port, self.most, self.cr, self.going = port, 0.0, 0.0, True
        self.preempted_before = (metrics(port) or {}).get(_PREEMPTIONS, 0.0)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while self.going:
            found = metrics(self.port) or {}
            self.most = max(self.most, found.get("vllm:num_requests_running", 0.0))
            self.cr = max(self.cr, found.get("dms:compression_ratio", 0.0))
            time.sleep(0.1)

    def stop(self) -> dict[str, float]:
        self.going = False
        self.thread.join()
        found = metrics(self.port) or {}
        preempted = found.get(_PREEMPTIONS, 0.0) - self.preempted_before
        return {"at_once": self.most, "preemptions": preempted, "most_cr": self.cr}


if __name__ == "__main__":
    main()
