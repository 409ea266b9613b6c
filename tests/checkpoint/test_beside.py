"""What lies beside the weights: one rule, and every way of the command keeps the same files."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import w8a8
from tests.conftest import llama
from w8a8.checkpoint.beside import companions, copy_companions
from w8a8.cli import main
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError, ModelError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
KEPT = {
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": '{"in_features": 64}',
    "LICENSE": "as is",
    "README.md": "# A model",
    "chat_template.jinja": "{{ messages }}",
    "config_sentence_transformers.json": '{"prompts": {"query": "query: "}}',
    "modeling_own.py": "raise AssertionError('nobody runs this')",
    "modules.json": json.dumps(MODULES),
    "preprocessor_config.json": '{"size": 32}',
    "prompts/query.txt": "query: ",
    "sentencepiece.bpe.model": "pieces",
    "special_tokens_map.json": '{"pad_token": "<pad>"}',
}
LEFT = {
    ".gitattributes": "",
    "1_Pooling/.cache": "",
    "onnx/config.json": "{}",
    "onnx/model.onnx": "weights",
    "original/deeper/consolidated.00.pth": "weights",
    "original/params.json": "{}",
    "pytorch_model.bin": "weights",
    "pytorch_model.bin.index.json": "{}",
}


def write(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


@pytest.fixture
def source(tmp_path):
    """A float model with everything that directories have."""
    shutil.copytree(demo_directory(), tmp_path / "source")
    write(tmp_path / "source", KEPT | LEFT)
    save_file({"linear.weight": torch.ones(2, 2)}, tmp_path / "source" / "2_Dense" / "model.safetensors")
    return tmp_path / "source"


def tree(directory):
    """The files by their path, with what they hold."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def kept(files):
    """What is kept, by the names that it then has: the card of the float model makes room for that of the result."""
    return {"README.source.md" if name == "README.md" else name: held for name, held in files.items()}


def without_weights(files):
    return {name: held for name, held in files.items() if not name.startswith("model")}


def test_what_is_kept_and_what_is_not(source):
    names = {str(path.relative_to(source)) for path in companions(source)}
    assert set(KEPT) | {"2_Dense/model.safetensors", "tokenizer.json"} <= names
    assert not names & {*LEFT, "config.json", "model.safetensors"}


def test_a_copy_has_the_same_bytes(source, tmp_path):
    (tmp_path / "target").mkdir()
    copy_companions(source, tmp_path / "target")
    names = {str(path.relative_to(source)) for path in companions(source)}
    assert tree(tmp_path / "target") == kept({name: held for name, held in tree(source).items() if name in names})


def test_a_taken_name_of_the_float_models_card_is_told(source):
    write(source, {"README.source.md": "# Of something else"})
    with pytest.raises(
        CheckpointError, match=r"README\.md, which is to be kept as README\.source\.md, and that is there"
    ):
        companions(source)


@pytest.mark.parametrize("name", ["secret.json", "1_Pooling/secret.json"])
def test_a_link_that_leads_elsewhere_is_not_followed(source, tmp_path, name):
    (tmp_path / "secret.json").write_text("{}")
    (source / name).symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"secret\.json is a link to .*: it is not followed"):
        companions(source)


def test_a_folder_that_is_a_link_is_not_followed(source, tmp_path):
    (source / "folder").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="folder is a link to a folder: it is not followed; put the folder"):
        companions(source)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '[{"name": "x"}]'])
def test_torn_modules_are_refused(source, text):
    (source / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules\.json is not a list of modules that each have a path"):
        companions(source)


class TestEveryWayOfTheCommand:
    @pytest.fixture
    def run(self, monkeypatch, source):
        def quantized(target, *options):
            monkeypatch.setattr(sys, "argv", ["w8a8", "quantize", str(source), "-o", str(target), *options])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code
            return tree(target)

        return quantized

    @pytest.fixture
    def text(self, tmp_path):
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        return str(tmp_path / "text.txt")

    @pytest.mark.parametrize("generation", [True, False])
    def test_files_to_files_writes_what_memory_writes(self, run, source, tmp_path, generation):
        if not generation:
            (source / "generation_config.json").unlink()
        streamed = run(tmp_path / "streamed")
        assert run(tmp_path / "memory", "--no-stream") == streamed
        assert {name: held.decode() for name, held in streamed.items() if name in kept(KEPT)} == kept(KEPT)
        assert b"[README.source.md](README.source.md)" in streamed["README.md"]
        assert not set(LEFT) & set(streamed)
        assert ("generation_config.json" in streamed) is generation

    def test_block_by_block_writes_what_memory_writes(self, run, tmp_path, text):
        options = ["--calib", text, "--calib-samples", "2", "--calib-length", "16", "--smooth", "0.5"]
        blocks = run(tmp_path / "blocks", "--stream", *options)
        assert without_weights(run(tmp_path / "memory", *options)) == without_weights(blocks)
        assert {"README.md", *kept(KEPT)} <= set(blocks)


class Sentences(nn.Module):
    """A stand-in for a `SentenceTransformer`: it has no config, and writes its modules beside the model's files."""

    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def save_pretrained(self, path):
        for model in self.models:
            model.save_pretrained(path)
        write(Path(path), {name: text for name, text in KEPT.items() if name.startswith(("1_", "modules", "config_"))})


class TestAModuleAroundAModel:
    def test_its_own_files_are_kept(self, tmp_path, tokens):
        model = llama()
        sentences = Sentences(model)
        w8a8.quantize(sentences)
        w8a8.save(sentences, tmp_path / "saved")
        assert {"modules.json", "1_Pooling/config.json", "config.json", "model.safetensors"} <= set(
            tree(tmp_path / "saved")
        )
        with torch.inference_mode():
            assert torch.equal(w8a8.load(tmp_path / "saved")(tokens).logits, model(tokens).logits)

    def test_saved_by_itself_it_is_read_as_what_it_is(self, tmp_path, tokens):
        model = llama()
        sentences = Sentences(model)
        w8a8.quantize(sentences)
        sentences.save_pretrained(tmp_path)
        with torch.inference_mode():
            assert torch.equal(w8a8.load(tmp_path)(tokens).logits, model(tokens).logits)

    def test_two_models_are_not_one(self, tmp_path):
        both = Sentences(llama(), llama())
        w8a8.quantize(both)
        with pytest.raises(ModelError, match="found Sentences, with 2 of them in it; save each by itself"):
            w8a8.save(both, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
