"""Groups of hand-made networks and random programs, folded: the function stays.  And what must be refused, is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import w8a8
from tests import conftest
from tests.dataflow.conftest import WIDTH, Gain, Net, assert_folds, linear, pairs, reasons, rows
from w8a8.dataflow.observing import observe


class Normed(nn.Module):
    """A LayerNorm by hand that stores weight - 1, with its bias added afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(WIDTH))
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)
        return (1 + self.gain) * x + self.shift


def test_a_sequential_and_a_tensor_are_enough():
    model = nn.Sequential(linear(20), nn.ReLU(), nn.Dropout(0.5), linear(8, 20), nn.GELU(), linear(WIDTH, 8)).double()
    flow = observe(model, rows())
    assert pairs(flow) == {"0": ["3"]}
    assert reasons(flow) == {"3": "GELU reads it in 4", "5": "it is an output of the model"}
    assert_folds(model.eval(), rows(), flow)
    assert flow.groups[0].block == ""


def test_a_hand_made_norm_has_its_offset_and_its_bias():
    model = Net(lambda m, x: m.read(m.norm(x)), norm=Normed(), read=linear())
    flow = observe(model, rows())
    (group,) = flow.groups
    assert [(p.name, p.dim, p.offset) for p in group.source.parameters] == [
        ("norm.gain", 0, 1.0),
        ("norm.shift", 0, 0.0),
    ]
    assert_folds(model, rows(), flow)


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH), lambda: Gain()])
def test_torchs_norms_and_a_plain_gain_are_sources(norm):
    model = Net(lambda m, x: m.read(m.norm(x).transpose(0, 1)), norm=norm(), read=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"norm": ["read"]}
    assert_folds(model, rows(), flow)


def test_torchs_own_encoder_layer_folds():
    model = nn.TransformerEncoderLayer(WIDTH, 3, 20, batch_first=True, norm_first=True).double().eval()
    flow = observe(model, rows())
    assert pairs(flow)["norm2"] == ["linear1"]
    assert pairs(flow)["linear1"] == ["linear2"]
    assert pairs(flow)["norm1"] == ["self_attn"]
    assert pairs(flow)["self_attn"] == ["self_attn.out_proj"]
    assert_folds(model, rows(), flow)


def test_what_was_made_in_inference_mode_has_the_same_groups():
    def made():
        layers = nn.LayerNorm(WIDTH), linear(20), nn.ReLU(), linear(8, 20)
        return nn.Sequential(*layers).double(), rows()

    with torch.inference_mode():
        model, x = made()
    assert next(model.parameters()).is_inference()
    assert pairs(observe(model, x)) == pairs(observe(*made())) == {"0": ["1"], "1": ["3"]}


def test_of_two_factors_the_later_one_is_scaled():
    model = Net(lambda m, x: m.down(F.relu(m.gate(x)) * m.up(x)), gate=linear(), up=linear(), down=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"up": ["down"]}
    assert reasons(flow)["gate"] == "down is scaled by up already, which is multiplied with it"
    assert_folds(model, rows(), flow)


def test_a_module_called_twice_alike_is_one_reader_and_one_source():
    model = Net(lambda m, x: m.read(m.norm(x)) + m.read(m.norm(2 * x + 1)), norm=nn.LayerNorm(WIDTH), read=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"norm": ["read"]}
    assert_folds(model, rows(), flow)


def test_a_reader_that_reads_something_else_too_is_refused():
    model = Net(lambda m, x: m.read(m.norm(x)) + m.read(x), norm=nn.LayerNorm(WIDTH), read=linear())
    flow = observe(model, rows())
    assert flow.groups == ()
    assert reasons(flow)["norm"] == "read is called again with something else"
    model = Net(lambda m, x: m.read(m.norm(x)) + m.read(m.norm(x).flip(-1)), norm=nn.LayerNorm(WIDTH), read=linear())
    assert reasons(observe(model, rows()))["norm"] == "read is called again with other channels of it"


def test_a_source_that_goes_on_in_a_second_block_has_both_blocks_readers():
    first, second = (Net(lambda m, x: m.inner(x), inner=linear()) for _ in range(2))
    model = Net(
        lambda m, x: (lambda y: x + m.first(y) + m.second(y))(m.norm(x)),
        norm=nn.LayerNorm(WIDTH),
        first=first,
        second=second,
    )
    flow = observe(model, rows())
    assert pairs(flow) == {"norm": ["first.inner", "second.inner"]}
    assert_folds(model, rows(), flow)


def test_a_tied_head_is_refused():
    model = conftest.llama(tie_word_embeddings=True)
    told = reasons(observe(model, {"input_ids": torch.arange(3, 20)[None]}))
    assert told["model.norm"] == "the weight of lm_head is tied to model.embed_tokens"


def test_a_gain_that_is_used_elsewhere_is_refused():
    model = Net(lambda m, x: m.read(m.norm(x)) * m.norm.weight.sum(), norm=Gain(), read=linear())
    assert reasons(observe(model, rows()))["norm"] == (
        "its parameter norm.weight is also used by sum in the model's own forward"
    )


def test_a_weight_that_is_used_elsewhere_is_refused_as_reader():
    model = Net(lambda m, x: m.read(m.norm(x)) * m.read.weight.norm(), norm=Gain(), read=linear())
    assert "read.weight that reads it is also used by linalg_vector_norm" in reasons(observe(model, rows()))["norm"]


def test_a_part_of_a_weight_is_no_reader():
    model = Net(lambda m, x: F.linear(m.norm(x), m.read.weight[:4]), norm=Gain(), read=linear())
    flow = observe(model, rows())
    assert flow.groups == ()
    assert "the matrix product with another tensor" in reasons(flow)["norm"]


def test_parameters_that_share_memory_are_refused():
    model = Net(lambda m, x: m.b(m.norm(m.a(x))), a=linear(), norm=Gain(), b=linear())
    model.b.weight = nn.Parameter(model.a.weight.data)
    flow = observe(model, rows())
    assert flow.groups == ()
    assert "whose memory it shares" in reasons(flow)["norm"]


class Experts(nn.Module):
    """A mixture of experts as modules, of which each token takes the one that its first feature says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor, pick: Tensor) -> Tensor:
        y, out = self.norm(x), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if bool((pick == i).any()):
                out[pick == i] = expert(y[pick == i])
        return out


def test_an_expert_that_got_no_token_refuses_what_it_may_read():
    model = Experts().double().eval()
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    flow = observe(model, {"x": x, "pick": torch.tensor([0, 1, 0, 1, 0, 1])})
    assert flow.unread == ("experts.2",)
    assert flow.groups == ()
    assert reasons(flow)["norm"] == (
        "experts.2 was not reached by this forward and may read it too: give inputs with more tokens"
    )
    every = {"x": x, "pick": torch.tensor([0, 1, 2, 2, 1, 0])}
    flow = observe(model, every)
    assert pairs(flow) == {"norm": ["experts.0", "experts.1", "experts.2"]}
    assert_folds(model, every, flow)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x).relu_()
    y *= x.sigmoid()
    return m.read(y)


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    room = torch.zeros(2, 5, 2 * WIDTH, dtype=x.dtype)
    room[..., :WIDTH] = m.norm(x)
    return m.read(room[..., :WIDTH])


def overwritten(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    head = y[:, :2]
    head += 1
    return m.read(y)


def added_to(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    z = m.read(y)
    y += x
    return z + y


def erased(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    z = m.read(y)
    y.zero_()
    y += x
    return z + y


def viewed_as_complex(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.read(y) + torch.view_as_complex(y.view(2, 5, -1, 2)).abs().sum()


@pytest.mark.parametrize(
    ("forward", "folds"),
    [
        (in_place, True),
        (written_through_a_view, True),
        (erased, True),
        (overwritten, False),
        (added_to, False),
        (viewed_as_complex, False),
        (lambda m, x: m.read(m.norm(x).masked_fill(x > 0, 0.0)), True),
        (lambda m, x: m.read(m.norm(x).masked_fill(x > 0, 0.5)), False),
        (lambda m, x: m.read(torch.where(x > 0, m.norm(x), 0.0)), True),
        (lambda m, x: m.read(torch.where(x > 0, m.norm(x), x)), False),
        (lambda m, x: m.read(F.pad(m.norm(x), (0, 0, 1, 1))[:, 1:-1]), True),
        (lambda m, x: m.read(F.pad(m.norm(x), (0, 0, 1, 1))), False),
        (lambda m, x: m.read(F.leaky_relu(-m.norm(x)).abs() / 3), True),
        (lambda m, x: m.read(torch.div(m.norm(x), 3, rounding_mode="floor")), False),
        (lambda m, x: m.read(m.norm(x).roll(2, -1)), True),
        (lambda m, x: m.read(m.norm(x) + m.norm(x).neg() * 0.5), True),
        (lambda m, x: m.read(m.norm(x) + m.norm(x).roll(1, -1)), False),
        (lambda m, x: m.read(m.norm(x).mean(1)), True),
        (lambda m, x: m.read(m.norm(x).amax(1)), True),
        (lambda m, x: m.read(m.norm(x) - m.norm(x).mean(-1, keepdim=True)), False),
        (lambda m, x: m.read((x @ x.mT).softmax(-1) @ m.norm(x)), True),
        (lambda m, x: m.read((m.norm(x) @ x.mT).softmax(-1) @ m.norm(x)), False),
        (lambda m, x: m.read(torch.stack(m.norm(x).unbind(1), 1).repeat(1, 2, 1)), True),
        (lambda m, x: m.read(m.norm(x)[:, torch.tensor([3, 0, 0])].contiguous()), True),
        (lambda m, x: m.read(m.norm(x).clamp(max=1.0)), False),
        (lambda m, x: m.read(m.norm(x).to(torch.int32).to(x.dtype)), False),
        (lambda m, x: m.read(m.norm(x) * m.norm(x)), False),
        (lambda m, x: m.read(1 / m.norm(x)), False),
        (lambda m, x: m.read(x / m.norm(x)), False),
        (lambda m, x: torch.addmm(m.norm(x)[0], x[0], m.read.weight) + m.read(m.norm(x)[0]), False),
        (lambda m, x: torch.einsum("btk,nk->btn", m.norm(x), m.read.weight), True),
        (lambda m, x: m.read(m.norm(x).view(2, 5, 3, 4).transpose(1, 2).reshape(6, 5, 4).view(2, 3, 5, 4)
                             .transpose(1, 2).reshape(2, 5, WIDTH)), True),
        (lambda m, x: (m.read(m.norm(x)), float(m.norm(x).sum()))[0], False),
        (lambda m, x: m.read(m.norm(x)) * torch.zeros_like(m.norm(x)).cos() * m.norm(x).sign(), True),
    ],
)  # fmt: skip
def test_what_commutes_folds_and_what_does_not_is_refused(forward, folds):
    model = Net(forward, norm=Gain(), read=linear())
    flow = observe(model, rows())
    assert ("norm" in pairs(flow)) == folds
    assert ("norm" in reasons(flow)) == (not folds)
    assert_folds(model, rows(), flow)


STEPS: dict[str, Any] = {
    "read": lambda m, a, b: m.parts["read"](a),
    "make": lambda m, a, b: m.parts["make"](a),
    "norm": lambda m, a, b: m.parts["norm"](a),
    "gain": lambda m, a, b: m.parts["gain"](a),
    "offset": lambda m, a, b: m.parts["offset"](a),
    "relu": lambda m, a, b: F.relu(a),
    "gelu": lambda m, a, b: F.gelu(a),
    "add": lambda m, a, b: a + b,
    "multiply": lambda m, a, b: a * b,
    "gate": lambda m, a, b: a * b.sigmoid(),
    "halves": lambda m, a, b: torch.cat(a.chunk(2, -1)[::-1], -1),
    "splice": lambda m, a, b: torch.cat([a[..., :6], b[..., 6:]], -1),
    "heads": lambda m, a, b: a.view(2, 5, 3, 4).transpose(2, 3).reshape(2, 5, WIDTH),
    "tokens": lambda m, a, b: a.flip(1),
    "attend": lambda m, a, b: (b @ b.mT).softmax(-1) @ a,
    "in place": lambda m, a, b: a.clone().mul_(2).add_(b),
    "through a view": lambda m, a, b: _written(a, b),
    "mean": lambda m, a, b: a.mean(1, keepdim=True).expand_as(a),
    "select": lambda m, a, b: torch.where(b > 0, a, 0.0),
}


def _written(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[:, :2] = b[:, :2]
    return a


class Program(nn.Module):
    """A random program over tensors of one shape; what nobody reads is read by the head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        names = [*STEPS, *4 * ("relu", "gate", "halves", "heads", "tokens", "attend", "select", "mean")]

        def draw(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        first = ("make", "norm", "gain", "offset")[draw(4)]
        self.steps = [(first, 0, 0)] + [(names[draw(len(names))], i + draw(2), draw(i + 2)) for i in range(4)]
        parts = {"norm": nn.LayerNorm(WIDTH), "gain": Gain(), "offset": Normed(), "read": linear(), "make": linear()}
        self.parts = nn.ModuleDict({name: parts[name] for name, _, _ in self.steps if name in parts})
        self.head = linear(4)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for name, a, b in self.steps:
            values.append(STEPS[name](self, values[a], values[b]))
        return self.head(values[-1])


def test_whatever_a_program_does_its_groups_fold():
    folded = 0
    for seed in range(200):
        model = Net(lambda m, x: m.program(x), program=Program(seed))
        flow = observe(model, rows())
        folded += len(flow.groups)
        assert_folds(model, rows(), flow)
    assert folded > 50


def test_a_layer_scale_takes_the_place_of_its_linear():
    model = Net(lambda m, x: m.read(m.scale(m.make(x))), make=linear(), scale=Gain(0.1), read=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"scale": ["read"]}
    assert "is scaled by scale already" in reasons(flow)["make"]
    assert_folds(model, rows(), flow)


def test_what_a_hook_keeps_is_refused():
    model = Net(lambda m, x: m.read(m.norm(x)), norm=Gain(), read=linear())
    kept = []
    model.norm.register_forward_hook(lambda _, __, out: kept.append(out))
    assert reasons(observe(model, rows()))["norm"] == "it outlives the forward, in a cache or a hook of the model"


def test_a_quantised_layer_is_no_reader():
    model = nn.Sequential(nn.LayerNorm(WIDTH), linear())
    w8a8.quantize(model)
    for simulated in (False, True):
        if simulated:
            model = nn.Sequential(nn.LayerNorm(WIDTH), linear())
            w8a8.simulate(model)
        told = reasons(observe(model, rows().float()))
        assert "a quantised layer, whose weight cannot be rescaled (fold before quantising), reads it in 1" in told["0"]
