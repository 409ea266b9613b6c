import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

import w8a8
from tests.conftest import crossed, gpt2, llama, named, opt
from w8a8.core.scheme import PerChannel, PerColumn, PerToken, QuantSpec, Scheme
from w8a8.errors import CheckpointError, ModelError, SchemeError


def test_the_directory_has_what_others_expect(tmp_path):
    model = w8a8.quantize(llama()).model
    w8a8.save(model, tmp_path / "deep" / "out")
    config = json.loads((tmp_path / "deep/out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["format"] == "int-quantized"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    tensors = load_file(tmp_path / "deep/out/model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.weight"].dtype is torch.int8
    assert tensors[f"{name}.weight_scale"].shape == (64, 1)
    assert tensors[f"{name}.weight_scale"].dtype is torch.float32
    assert not [key for key in tensors if "zero_point" in key or "weight_sum" in key]
    assert (tmp_path / "deep/out/generation_config.json").exists()
    assert sorted(os.listdir(tmp_path / "deep")) == ["out"]


def test_big_files_are_sharded_with_an_index(tmp_path):
    model = w8a8.quantize(llama()).model
    w8a8.save(model, tmp_path / "out", max_shard_size="40KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(w8a8.load(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_the_tokenizer_goes_along(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(Path(w8a8.__file__).parent / "demo_model")
    w8a8.save(w8a8.quantize(llama()).model, tmp_path / "out", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("Return a list.")["input_ids"] == tokenizer("Return a list.")["input_ids"]


def test_what_exists_is_not_overwritten_unasked(tmp_path):
    model = w8a8.quantize(llama()).model
    out = tmp_path / "out"
    w8a8.save(model, out)
    (out / "mark").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        w8a8.save(model, out)
    assert (out / "mark").exists()
    w8a8.save(model, out, overwrite=True)
    assert not (out / "mark").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_checkpoint_is_never_overwritten(tmp_path):
    model = w8a8.quantize(llama()).model
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint \(it has no config.json\)"):
        w8a8.save(model, tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        w8a8.save(model, tmp_path / "thesis.txt", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    w8a8.save(w8a8.quantize(llama()).model, tmp_path / "out")
    assert (tmp_path / "out/config.json").exists()


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(tmp_path):
    w8a8.save(w8a8.quantize(llama()).model, tmp_path / "out")
    model = w8a8.load(tmp_path / "out")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        w8a8.save(model, tmp_path / "out", overwrite=True)
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(w8a8.load(tmp_path / "out")(tokens).logits, expected)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_new_and_the_old_as_it_was(tmp_path, monkeypatch, existing):
    model = w8a8.quantize(llama()).model
    out = tmp_path / "out"
    if existing:
        w8a8.save(model, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()} if existing else None

    def full_disk(*_args, **_options):
        raise OSError("no space left on device")

    monkeypatch.setattr(model.generation_config, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        w8a8.save(model, out, overwrite=True)
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    if existing:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_failing_rename_brings_the_old_directory_back(tmp_path, monkeypatch):
    model = w8a8.quantize(llama()).model
    out = tmp_path / "out"
    w8a8.save(model, out)
    (out / "mark").write_text("old")
    rename = Path.rename

    def fails_for_the_new(self, target):
        if ".partial-" in self.name:
            raise OSError("rename failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="rename failed"):
        w8a8.save(model, out, overwrite=True)
    assert (out / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_a_killed_process_leaves_no_directory_that_looks_complete(tmp_path):
    code = f"""
import os, signal
import w8a8
from tests.conftest import llama
from w8a8.checkpoint import writer
writer._sync = lambda directory: os.kill(os.getpid(), signal.SIGKILL)  # everything is written, nothing renamed
w8a8.save(w8a8.quantize(llama()).model, {str(tmp_path / "out")!r})
"""
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, check=False, timeout=120)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(name.startswith(".out.partial-") for name in os.listdir(tmp_path))


def test_several_schemes_are_written_by_name(tmp_path):
    model = llama()
    w8a8.quantize(model, "w8a8-asym", include=["*.mlp.*"])
    w8a8.quantize(model, "w8a8", include=["*.self_attn.*"], exclude=["*.o_proj"])
    w8a8.save(model, tmp_path / "out")
    loaded = w8a8.load(tmp_path / "out")
    assert loaded.model.layers[0].mlp.up_proj.scheme.name == "w8a8-asym"
    assert loaded.model.layers[0].self_attn.q_proj.scheme.name == "w8a8"
    assert isinstance(loaded.model.layers[0].self_attn.o_proj, nn.Linear)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_an_untied_head_is_saved_and_loaded(tmp_path):
    model = w8a8.quantize(opt(), include=["*", "lm_head"]).model
    w8a8.save(model, tmp_path / "out")
    loaded = w8a8.load(tmp_path / "out")
    assert loaded.lm_head.codes.dtype is torch.int8
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


STATIC_ASYM = Scheme(QuantSpec(8, PerChannel()), QuantSpec(8, symmetric=False, dynamic=False))


@crossed(
    "make scheme",
    [llama, opt, gpt2],
    ["w8a8", "w8a8-asym", "w8a8-o2", "w8a8-static", "w8a8-o3", STATIC_ASYM, "w8a16"],
    ids=named,
)
def test_a_saved_model_loads_with_equal_tensors_and_logits(tmp_path, make, scheme):
    data = [torch.arange(30)[None]]
    model = w8a8.quantize(make(), scheme, calibration=data, observer="mse", smooth="none").model
    w8a8.save(model, tmp_path / "out")
    loaded = w8a8.load(tmp_path / "out")
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert a.dtype is b.dtype
        assert torch.equal(a, b)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    column = w8a8.simulate(llama(), Scheme(QuantSpec(8, PerColumn()), QuantSpec(8, PerToken()))).model
    with pytest.raises(SchemeError, match="exist in simulation only"):
        w8a8.save(column, tmp_path / "out")
    with pytest.raises(ModelError, match="nothing in this LlamaForCausalLM is quantised"):
        w8a8.save(llama(), tmp_path / "out")
    plain = nn.Sequential(nn.Linear(4, 4))
    w8a8.quantize(plain)
    with pytest.raises(ModelError, match="expected a transformers model"):
        w8a8.save(plain, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("buffer", "found"),
    [
        (torch.zeros(3, dtype=torch.complex128), r"complex128 \(strided\)"),
        (torch.eye(3).to_sparse(), r"float32 \(sparse_coo\)"),
    ],
)
def test_a_tensor_that_files_cannot_have_is_told_by_its_name_before_there_are_weights(tmp_path, buffer, found):
    model = w8a8.quantize(llama()).model
    part = model.model.layers[0]
    part.register_buffer("turns", buffer)
    says = rf"its model\.layers\.0\.turns is {found}, .* persistent=False"
    with pytest.raises(ModelError, match=says):
        w8a8.save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ModelError, match=says):
        model.save_pretrained(tmp_path / "theirs")
    assert not list((tmp_path / "theirs").glob("*.safetensors"))
    del part.turns
    part.register_buffer("turns", buffer, persistent=False)
    w8a8.save(model, tmp_path / "out")


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path):
    model = w8a8.quantize(llama()).model
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot be made: .*file is a file; choose another place"):
        w8a8.save(model, tmp_path / "file" / "deep" / "out")
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match="a directory that may not be written"):
        w8a8.save(w8a8.quantize(llama()).model, tmp_path / "out")


def a_dangling_link(folder):
    (folder / "dangling").symlink_to("nowhere")
    return folder / "dangling"


def a_link_to_itself(folder):
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


BAD_NAMES = [
    pytest.param(a_dangling_link, "is a link to nowhere, which is not there", id="a dangling link"),
    pytest.param(lambda folder: a_dangling_link(folder) / "deep", "is a link to nowhere", id="below a dangling link"),
    pytest.param(a_link_to_itself, "is a link to loop, which is not there", id="a link to itself"),
    pytest.param(lambda folder: folder / ("n" * 256), "does not take this name", id="256 bytes"),
    pytest.param(lambda folder: folder / ("\u00e9" * 128), "does not take this name", id="256 bytes, 128 letters"),
    pytest.param(lambda folder: folder / ("n" * 240), "longer one that is made beside it", id="too long beside it"),
    pytest.param(lambda folder: folder / ("n" * 256) / "out", "does not take this name", id="a long parent"),
    pytest.param(lambda folder: folder / "new" / ("n" * 256) / "out", "does not take this name", id="a long one below"),
    pytest.param(lambda folder: folder.joinpath(*["n" * 200] * 30), "does not take this name", id="a long path"),
    pytest.param(lambda folder: folder / "n\0ul", "does not take this name", id="a NUL"),
    pytest.param(lambda folder: folder / "\ud800", "does not take this name", id="half a surrogate pair"),
    pytest.param(lambda folder: folder / "new" / "..", "the name '..'", id="dots"),
]


@pytest.mark.parametrize(("name", "told"), BAD_NAMES)
def test_a_name_that_no_directory_can_have_is_refused_before_anything_is_made(tmp_path, name, told):
    target = name(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=told):
        w8a8.save(w8a8.quantize(llama()).model, target)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    target = tmp_path / "new" / ("n" * 235)
    w8a8.save(w8a8.quantize(llama()).model, target)
    assert (target / "config.json").exists()


@pytest.mark.parametrize("size", ["banana", "5 apples", "nanGB", 1j], ids=str)
def test_a_size_that_is_none_is_refused_before_anything_is_made(tmp_path, size):
    with pytest.raises(SchemeError, match=r"max_shard_size=.* is not the size of a file"):
        w8a8.save(w8a8.quantize(llama()).model, tmp_path / "new" / "out", max_shard_size=size)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("beside", ["missing", "n" * 300, "n\0ul"], ids=["missing", "long", "NUL"])
def test_files_of_a_directory_that_is_not_there_are_missed_before_anything_is_made(tmp_path, beside):
    with pytest.raises(CheckpointError, match="there is no such directory; give the one"):
        w8a8.save(w8a8.quantize(llama()).model, tmp_path / "new" / "out", beside=beside)
    assert not os.listdir(tmp_path)


def test_a_failure_takes_the_parents_that_were_made_for_it_along(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("broken")

    model = w8a8.quantize(llama()).model
    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(RuntimeError, match="broken"):
        w8a8.save(model, tmp_path / "new" / "deep" / "out")
    assert not os.listdir(tmp_path)
