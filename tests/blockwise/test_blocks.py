"""One block at a time computes what the whole model does, and where it would not, says so."""

import pytest
import torch
from torch import nn

from tests import families
from tests.blockwise.conftest import data
from w8a8.blockwise.activations import Reader, Recorder
from w8a8.blockwise.blocks import BlockWalk
from w8a8.calibration.data import Calibration
from w8a8.errors import ModelError

WALKED = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "opt",
    "opt-post-norm",
    "gpt2",
    "gpt-neox",
    "qwen2",
    "qwen3",
    "mixtral",
    "bloom",
    "falcon-alibi",
    "phi3",
    "bert",
)


def walked_outputs(model, calibration, tmp_path):
    """Logits on each batch when only one block is there at a time."""
    walk = BlockWalk(model)
    walk.check(calibration)
    read = None
    for number in range(len(walk)):
        recorder = Recorder(tmp_path / f"{number}.safetensors", walk.states)
        with walk.only(number, None):
            walk.calibration(calibration, number, read, recorder.take).run(model)
        recorder.finish()
        read = Reader(recorder.path)
    found = []
    handle = model.register_forward_hook(lambda module, args, output: found.append(output.logits))
    walk.calibration(calibration, len(walk), read).run(model)
    handle.remove()
    return found


@pytest.mark.parametrize("family", WALKED)
def test_one_block_at_a_time_computes_what_the_model_does(tmp_path, family):
    model, calibration = families.build(family, dtype=torch.float32), data()
    with torch.no_grad():
        wanted = [model(**inputs).logits for inputs in calibration.batches]
    found = walked_outputs(model, calibration, tmp_path)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "gpt-neox", "mixtral", "bloom"])
def test_a_block_called_alone_computes_what_it_does_in_the_model(tmp_path, family):
    model, calibration = families.build(family, dtype=torch.float32), data()
    walk = BlockWalk(model)
    walk.check(calibration)
    one = Calibration.of([calibration.batches[0]])
    returned = [None]  # by the block before
    for number, block in enumerate(walk.blocks):
        first = returned[-1]
        with walk.only(number, None):
            read = None if first is None else lambda batch: returned[-1]
            walk.calibration(one, number, read, lambda batch, hidden: returned.append(hidden)).run(model)
        inputs = walk.arguments(number, calibration.batches[0], first)
        with torch.no_grad():
            out = block(**inputs) if isinstance(inputs, dict) else block(inputs)
        assert torch.equal(out if isinstance(out, torch.Tensor) else out[0], returned[-1])
        assert not block._forward_pre_hooks


def test_a_block_that_is_left_out_is_missed(tmp_path):
    model, calibration = families.build("gemma3", dtype=torch.float32), data()
    with torch.no_grad():
        wanted = model(**calibration.batches[0]).logits
    walk = BlockWalk(model)
    walk.check(calibration)
    with torch.no_grad():
        assert not torch.equal(model(**calibration.batches[0]).logits, wanted)


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_encoder_decoders_are_refused(family):
    with pytest.raises(ModelError, match="an encoder and a decoder"):
        BlockWalk(families.build(family, dtype=torch.float32))


class _Skips(nn.Module):
    """Blocks of which the second is given what the first was."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return sum(block(x + i) for i, block in enumerate(self.blocks))


def test_blocks_that_do_not_follow_one_another_are_refused():
    with pytest.raises(ModelError, match="not called one after another"):
        BlockWalk(_Skips()).check(data())
