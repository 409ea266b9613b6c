"""The way to a saved directory, gone on a stand-in first."""

import pytest

from tests.conftest import llama, opt
from tests.families import FAMILIES, build
from w8a8 import Scheme
from w8a8.checkpoint.rehearsal import rehearse
from w8a8.errors import CheckpointError

NOT_OURS = {"falcon", "falcon-new", "falcon-alibi"}  # their linear layers are a class of their own


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NOT_OURS))
def test_every_family_has_a_stand_in_that_is_saved(tmp_path, name):
    rehearse(build(name), Scheme.of("w8a8"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-o3", "w8a16"])
def test_every_kind_of_scheme_is_saved(tmp_path, scheme):
    rehearse(opt(), Scheme.of(scheme), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_fails_is_told_and_leaves_nothing(tmp_path):
    class Torn:
        def save_pretrained(self, directory):
            raise ValueError("this tokenizer has no files")

    model = llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM cannot be saved.*ValueError: this tokenizer has no"):
        rehearse(model, Scheme.of("w8a8"), tmp_path / "out", Torn())
    assert not list(tmp_path.iterdir())
    assert all((before[name] == t).all() for name, t in model.state_dict().items())
