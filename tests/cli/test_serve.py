"""`w8a8 serve`: an OpenAI client streams a completion from int8 layers."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from w8a8 import kernels
from w8a8.cli import main
from w8a8.demo.run import demo_directory


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def directory(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo_directory())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype="float32")
    w8a8.quantize(model)
    w8a8.save(model, tmp_path / "saved", tokenizer)
    return tmp_path / "saved"


OWN = """
from transformers import OPTConfig, OPTForCausalLM
class OwnConfig(OPTConfig):
    model_type = "nobodys"
class OwnModel(OPTForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(directory, tmp_path):
    """The same weights as a model that transformers has no class for."""
    path = tmp_path / "own"
    shutil.copytree(directory, path)
    (path / "own.py").write_text(OWN)
    config = json.loads((path / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changes = {"model_type": "nobodys", "architectures": ["OwnModel"], "auto_map": code}
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


@pytest.fixture(params=["a class of transformers", pytest.param("code of its own", marks=pytest.mark.slow)])
def served(request, directory, own_code):
    """A directory, and the options that it takes to serve it."""
    if request.param == "code of its own":
        return own_code, ["--trust-remote-code"]
    return directory, []


@pytest.fixture
def server(served, tmp_path):
    directory, options = served
    port = free_port()
    source = str(Path(w8a8.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-m", "w8a8", "serve", str(directory), *options, "--port", str(port), "--device", "cpu"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], env=environment, stdout=file, stderr=file)
        yield port, process, log
        process.terminate()
        process.wait(timeout=30)


def wait_for(port, process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_a_client_streams_a_completion_from_integer_layers(server, served, directory):
    port, process, log = server
    wait_for(port, process, log)
    messages = [{"role": "user", "content": "Return the"}]
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
        client.chat.completions.create(
            model=str(served[0]), messages=messages, stream=True, max_tokens=8, temperature=0.0
        ) as stream,
    ):
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), w8a8.load(directory)
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    wanted = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert text
    told = log.read_text()
    first = kernels.first_choice("auto")
    assert f"is quantised, kernel {first}" in told
    assert "36 linear layers of saved run in integers" in told or "36 linear layers of own run in integers" in told


def test_code_of_a_repository_is_not_served_unasked(monkeypatch, capsys, own_code):
    monkeypatch.setattr("sys.argv", ["w8a8", "serve", str(own_code)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "brings code of its own" in (told := capsys.readouterr().err)
    assert "--trust-remote-code" in told


def test_what_is_missing_is_told_with_the_way_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["w8a8", "serve", str(demo_directory())])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "pip install 'w8a8[serve]'" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["w8a8", "serve", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        main()
    assert "there is no such directory" in capsys.readouterr().err
