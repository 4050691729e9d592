"""An exported folder that transformers' own class loads, as `transformers serve` does: by `generate` it evicts."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import dms
from dms.export.folder import export

COMMIT = "0123456789abcdef" * 2 + "89abcdef"
OPTIONS = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
IDS = torch.randint(2, 97, (1, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "out"
    export(tiny, folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny):
    return dms.load(tiny, device="cpu").generate(IDS, **OPTIONS)


def test_generate_of_the_base_s_class_evicts(out, expected):
    model = LlamaForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model) is LlamaForCausalLM and not hasattr(model, "dms")
    for _ in range(2):
        assert torch.equal(model.generate(IDS, **OPTIONS), expected)
    assert model.dms.mode == "evict"
    # As servers call it.
    returned = model.generate(input_ids=IDS, return_dict_in_generate=True, **OPTIONS)
    cache = returned.get("cache", returned.get("past_key_values"))
    assert type(cache).__name__ == "DMSCache" and cache.report(warn=False).cr > 1.1


def test_without_trust_it_is_the_dense_model(out, tiny, expected):
    dense = dms.load(tiny, device="cpu", mode="dense").generate(IDS, **OPTIONS)
    assert not torch.equal(dense, expected)
    assert torch.equal(LlamaForCausalLM.from_pretrained(out).generate(IDS, **OPTIONS), dense)


@pytest.mark.slow
def test_a_hub_s_folder_by_its_commit(out, expected, tmp_path, monkeypatch):
    repository = tmp_path / "models--acme--tiny"
    shutil.copytree(out, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = LlamaForCausalLM.from_pretrained("acme/tiny", trust_remote_code=True)
    assert torch.equal(model.generate(IDS, **OPTIONS), expected)


def test_gates_of_other_weights_are_refused_at_the_first_call(out, tmp_path):
    other = shutil.copytree(out, tmp_path / "other")
    dense = LlamaForCausalLM.from_pretrained(out)
    with torch.no_grad():
        dense.model.norm.weight.mul_(2)
    dense.save_pretrained(tmp_path / "weights")
    shutil.copyfile(tmp_path / "weights" / "model.safetensors", other / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(other, trust_remote_code=True)
    with pytest.raises(ValueError, match="these gates belong to another base"):
        model.generate(IDS, **OPTIONS)


@pytest.mark.slow
def test_saved_and_exported_again_it_is_there(out, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "again")
    for folder in ("saved", "again"):
        assert (tmp_path / folder / "custom_generate" / "generate.py").read_bytes() == (
            out / "custom_generate" / "generate.py"
        ).read_bytes()
    export(out, tmp_path / "merged", format="merged")
    assert not (tmp_path / "merged" / "custom_generate").exists()


def test_another_generate_in_the_folder_is_refused(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "model")
    (source / "custom_generate").mkdir()
    (source / "custom_generate" / "generate.py").write_text("def generate(model): ...\n")
    with pytest.raises(ValueError, match=r"custom_generate/generate.py changes generation, .* choose --format merged"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "merged", format="merged")
    assert (tmp_path / "merged" / "custom_generate" / "generate.py").is_file()


def test_transformers_continuous_batching_is_refused(tiny):
    model = dms.load(tiny, device="cpu")
    with pytest.raises(ValueError, match=r"keeps what gates evict; call dms\.generate_batch"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match=r"keeps what gates evict; call dms\.generate_batch"):
        model.generate_batch([[5, 9, 3]])


TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
STORM = "In the year of the great storm the harbour was closed, and the merchants met in the house of the old captain to share what they had saved."
QUESTION = {"role": "user", "content": STORM}


@pytest.fixture(scope="module")
def server(out, tmp_path_factory):
    """(the folder, the address) of a `transformers serve` in a process of its own."""
    needed = ("openai", "fastapi", "uvicorn")
    if absent := [name for name in needed if find_spec(name) is None]:
        pytest.skip(f"{', '.join(absent)} not installed (pip install 'dms-retrofit[openai]')")
    folder = shutil.copytree(out, tmp_path_factory.mktemp("server") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import app; app()", "serve", str(folder), "--trust-remote-code"]
    env = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    log = folder.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield folder, address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_transformers_serve_answers_as_generate_does(server):
    from openai import OpenAI

    folder, address = server
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [str(folder)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, dense = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), LlamaForCausalLM.from_pretrained(folder)

    def answer(model, given) -> tuple[str, int]:
        """Text and number of tokens."""
        new = model.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True), len(new)

    def read(messages):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    options = {"model": str(folder), "max_tokens": 24, "temperature": 0}
    first = client.chat.completions.create(messages=[QUESTION], **options)
    text = first.choices[0].message.content
    assert (text, first.usage.completion_tokens) == answer(model, read([QUESTION])) != answer(dense, read([QUESTION]))

    # The next request goes on with the first one's conversation.
    messages = [QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "Alice has the number 4821."}]
    second = client.chat.completions.create(messages=messages, **options)
    assert (second.choices[0].message.content, second.usage.completion_tokens) == answer(model, read(messages))

    chunks = list(client.chat.completions.create(messages=messages, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == second.choices[0].message.content
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 1

    completion = client.completions.create(prompt=STORM, **options)
    assert completion.choices[0].text == answer(model, tokenizer(STORM, return_tensors="pt"))[0]
