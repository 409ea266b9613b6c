"""The facts of a card are those of the directory and of where the model came from."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

import w8a8
from tests.conftest import gpt2, llama
from w8a8.checkpoint import about
from w8a8.checkpoint.about import add_measured, front_matter_of
from w8a8.checkpoint.card import Measured
from w8a8.checkpoint.directory import Tensors
from w8a8.errors import CheckpointError

MEASURED = Measured("On a text.", (("perplexity", "12.5", "12.1 to 12.9"),))


@pytest.fixture
def saved(tmp_path):
    model = llama()
    w8a8.quantize(model)
    w8a8.save(model, tmp_path / "saved")
    return tmp_path / "saved"


def front(path):
    return yaml.safe_load(path.read_text().split("---\n")[1])


class TestFrontMatter:
    def read(self, tmp_path, text):
        (tmp_path / "README.md").write_text(text)
        return front_matter_of(tmp_path / "README.md")

    def test_is_text_and_lists_of_text(self, tmp_path):
        text = "---\nlicense: mit\nlanguage: no\ntags: [a, b]\nmodel-index: [{name: x}]\n---\n# A model\n---\n"
        assert self.read(tmp_path, text) == {"license": "mit", "language": "no", "tags": ["a", "b"]}

    @pytest.mark.parametrize("text", ["", "# A model\n---\nlicense: mit\n---\n", "---\nlicense: mit\n"])
    def test_is_nothing_where_there_is_none(self, tmp_path, text):
        assert self.read(tmp_path, text) == {}

    def test_a_byte_order_mark_and_other_ends_of_lines_hide_nothing(self, tmp_path):
        (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n")
        assert front_matter_of(tmp_path / "README.md") == {"license": "mit"}

    @pytest.mark.parametrize("text", ["a: [", "- a", "!!python/object/apply:os.system [x]", "a: " + "[" * 2_000])
    def test_what_cannot_be_read_is_told_in_the_card_and_stops_nothing(self, tmp_path, text):
        source = tmp_path / "source"
        source.mkdir()
        (source / "README.md").write_text(f"---\n{text}\n---\n")
        model = llama()
        w8a8.quantize(model)
        w8a8.save(model, tmp_path / "saved", beside=source)
        assert "Its front matter cannot be read" in (tmp_path / "saved" / "README.md").read_text()
        assert "license" not in front(tmp_path / "saved" / "README.md")


class TestWhereItCameFrom:
    def test_a_snapshot_of_the_hub_tells_its_repository_and_commit(self, tmp_path):
        source = tmp_path / "models--owner--small" / "snapshots" / "0123abcd"
        llama().save_pretrained(source)
        (source / "README.md").write_text("---\nlicense: mit\n---\n")
        w8a8.quantize_directory(source, tmp_path / "saved")
        assert front(tmp_path / "saved" / "README.md")["base_model"] == "owner/small"
        assert front(tmp_path / "saved" / "README.md")["license"] == "mit"
        assert "at commit `0123abcd`" in (tmp_path / "saved" / "README.md").read_text()

    def test_a_name_counts_where_it_is_in_the_hubs_cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            about, "try_to_load_from_cache", lambda name, file: str(tmp_path) if name == "o/n" else None
        )
        model = llama()
        w8a8.quantize(model)
        for name, known in (("o/n", "o/n"), ("o/other", None), (str(tmp_path), None)):
            model.config._name_or_path = name
            model.name_or_path = name
            w8a8.save(model, tmp_path / "saved", overwrite=True)
            assert front(tmp_path / "saved" / "README.md").get("base_model") == known

    def test_a_name_that_no_repository_can_have_is_none(self):
        assert not about._is_cached("a//b c")

    def test_the_size_is_of_tensors_not_of_files(self, tmp_path):
        save_file({"a": torch.ones(3, 5), "b": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
        assert about._tensor_bytes(Tensors(tmp_path)) == 62


def test_a_coverage_that_is_given_has_the_reasons(tmp_path):
    model = llama()
    result = w8a8.quantize(model, exclude=["*.down_proj"])
    w8a8.save(model, tmp_path / "given", covered=result.coverage)
    w8a8.save(model, tmp_path / "alone")
    assert "excluded by '*.down_proj'" in (tmp_path / "given" / "README.md").read_text()
    alone = (tmp_path / "alone" / "README.md").read_text()
    assert "| an output head |" in alone
    assert "excluded" not in alone


def test_a_conv1d_is_told(tmp_path):
    for_memory = gpt2()
    for_memory.save_pretrained(tmp_path / "float")
    w8a8.quantize_directory(tmp_path / "float", tmp_path / "streamed")
    w8a8.quantize(for_memory)
    w8a8.save(for_memory, tmp_path / "memory", beside=tmp_path / "float")
    for way in ("memory", "streamed"):
        assert "no common format for quantised `Conv1D`" in (tmp_path / way / "README.md").read_text()


def test_what_was_measured_goes_into_the_card(saved):
    add_measured(saved, MEASURED)
    assert "| perplexity | 12.5 | 12.1 to 12.9 |" in (saved / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "found"), [("# Mine\n", "has no section for it"), (None, "cannot be read and written")]
)
def test_a_card_that_has_no_place_for_it_is_an_error(saved, text, found):
    (saved / "README.md").unlink()
    if text is not None:
        (saved / "README.md").write_text(text)
    with pytest.raises(CheckpointError, match=found):
        add_measured(saved, MEASURED)
    assert text is None or (saved / "README.md").read_text() == text
