import subprocess
import sys

from torch import nn

from tests.conftest import llama, mixtral
from w8a8.model.pretrained import conversions, is_pretrained, renames, stacks_experts


def test_a_plain_module_is_no_model_of_transformers_also_where_that_is_not_loaded():
    assert not is_pretrained(nn.Linear(2, 2))
    assert conversions(nn.Linear(2, 2)) == []
    code = (
        "import sys\nfrom torch import nn\nfrom w8a8.model.pretrained import is_pretrained\n"
        "print(is_pretrained(nn.Linear(2, 2)), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False False\n"


def test_mixtrals_conversions_stack_its_experts_or_rename():
    known = conversions(mixtral())
    assert [stacks_experts(each) for each in known].count(True) == 2  # gate with up, and down
    assert any(renames(each) and renames(each, prefix=False) for each in known)
    assert not any(renames(each) and stacks_experts(each) for each in known)
    assert is_pretrained(llama())
    assert not any(stacks_experts(each) for each in conversions(llama()))
