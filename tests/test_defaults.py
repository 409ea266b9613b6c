"""What a process sets for all of PyTorch changes nothing here: dtypes, devices, modes."""

import ast
import contextlib
import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import w8a8
from tests import ambient
from tests.checkpoint.test_skeleton import codegen, marian
from tests.conftest import every_third, llama, mixtral
from w8a8 import kernels
from w8a8.calibration.observers import OBSERVERS
from w8a8.core.affine import QParams
from w8a8.core.scheme import PRESETS, PerChannel, PerColumn, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.demo.run import demo_model, time_layer
from w8a8.directories import quantize_directory
from w8a8.evaluation.generation import continue_text
from w8a8.layers.linear import QuantLinear

pytestmark = pytest.mark.not_under(*ambient.SETTINGS, reason="the tests set them, and compare with what is without")

SOURCE = Path(w8a8.__file__).parent


def takes_a_device(kind):
    return "device" in inspect.signature(kind).parameters


FACTORIES = {
    "torch": {f.__name__ for f in _device_constructors() if f is not None} - {"Generator"},
    "nn": {name for name, kind in vars(nn).items() if inspect.isclass(kind) and takes_a_device(kind)},
}


def unnamed(tree):
    """Calls of torch's factories and layers that leave the dtype or the device to the process, and what is missing."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        owner = call.func.value
        if isinstance(owner, ast.Name) and call.func.attr in FACTORIES.get(owner.id, ()):
            missing = sorted({"dtype", "device"} - {keyword.arg for keyword in call.keywords})
            if missing:
                yield f"{call.lineno}: {owner.id}.{call.func.attr} without {', '.join(missing)}"


def test_every_new_tensor_names_its_dtype_and_device():
    found = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line in unnamed(ast.parse(path.read_text()))
    ]
    assert found == []


def test_the_check_itself_finds_them():
    tree = ast.parse(
        "torch.empty(3)\nx.new_empty(3)\ntorch.ones(2, dtype=d, device=e)\ntorch.arange(3, dtype=d)\nnn.Linear(2, 3)"
    )
    assert list(unnamed(tree)) == [
        "1: torch.empty without device, dtype",
        "4: torch.arange without device",
        "5: nn.Linear without device, dtype",
    ]


# the default device as a process sets it, once and for all; `ambient` enters and leaves it
@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    **{name: setting.set for name, setting in ambient.SETTINGS.items()},
    "meta": lambda: default_device("meta"),
    "no gradients": torch.no_grad,
}
SCHEMES = [
    *(preset.scheme for preset in PRESETS.values()),
    Scheme(QuantSpec(8, PerGroup(20)), QuantSpec(8, PerToken())),
    Scheme(QuantSpec(8, PerChannel(), symmetric=False), QuantSpec(8, PerToken(), symmetric=False)),
    Scheme(QuantSpec(8, PerColumn()), QuantSpec(12, PerChannel(), symmetric=False)),
    Scheme(QuantSpec(12, PerChannel()), QuantSpec(16, PerToken())),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IDS = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


def every_layer(linear, grids, x):
    """The output of every scheme by every kernel, and what the layer holds."""
    found = {}
    for scheme in SCHEMES:
        params = None
        if scheme.static:
            params = grids[scheme.activations.symmetric]
        here = [name for name, reason in kernels.available().items() if reason is None]
        names = [*here, "simulated"] if scheme.integer_executable else ["simulated"]
        for name in names:
            options = {"simulated": True} if name == "simulated" else {"kernel": name}
            q = QuantLinear.from_float(linear, scheme, input_params=params, **options)
            found |= {f"{scheme}, {name}, {key}": value for key, value in q.state_dict().items()}
            found[f"{scheme}, {name}, output"] = q(x)
            found[f"{scheme}, {name}, lost"] = q.weight_sqnr_db
            found[f"{scheme}, {name}, dtypes"] = [(key, b.dtype) for key, b in q.named_buffers()]
    return found


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype is value.dtype, key
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.filterwarnings("ignore:kernel 'native' cannot run")  # where it has no groups or float64, others do
@pytest.mark.parametrize("dtype", every_third(DTYPES), ids=str)
def test_layers_of_every_scheme_and_kernel_are_the_same(setting, dtype):
    linear, x = nn.Linear(100, 33).to(dtype).requires_grad_(False), torch.randn(3, 7, 100).to(dtype)
    grids = {True: QParams(torch.tensor([0.02]), None), False: QParams(torch.tensor([0.02]), torch.tensor([3]).int())}
    wanted = every_layer(linear, grids, x)
    with setting():
        found = every_layer(linear, grids, x)
    same(found, wanted)


def whole(model, directory, scheme, smooth):
    """Calibrated, smoothed, quantised, saved, loaded, and run."""
    result = w8a8.quantize(model, scheme, calibration=[IDS], smooth=smooth)
    found = {f"held {key}": value for key, value in model.state_dict().items()}
    found["logits"] = model(input_ids=IDS, use_cache=False).logits.detach()
    found["coverage"] = str(result.coverage)
    w8a8.save(model, directory)
    loaded = w8a8.load(directory)
    found |= {f"loaded {key}": value for key, value in loaded.state_dict().items()}
    found["logits of the loaded"] = loaded(input_ids=IDS, use_cache=False).logits.detach()
    return found


@pytest.mark.parametrize("name", every_third(SETTINGS))
@pytest.mark.parametrize("kind", ["static, smoothed", "experts"])
def test_models_are_the_same(tmp_path, name, kind):
    make, scheme, smooth = {
        "static, smoothed": (llama, "w8a8-static", "searched"),
        "experts": (mixtral, "w8a8", "none"),
    }[kind]
    model = make()
    wanted = whole(copy.deepcopy(model), tmp_path / "wanted", scheme, smooth)
    with SETTINGS[name]():
        found = whole(copy.deepcopy(model), tmp_path / "found", scheme, smooth)
    same(found, wanted)
    assert (tmp_path / "found" / "model.safetensors").read_bytes() == (
        tmp_path / "wanted" / "model.safetensors"
    ).read_bytes()


def test_streaming_writes_the_same_bytes(setting, tmp_path):
    llama().save_pretrained(tmp_path / "source")
    quantize_directory(tmp_path / "source", tmp_path / "wanted")
    with setting():
        quantize_directory(tmp_path / "source", tmp_path / "found")
    assert (tmp_path / "found" / "model.safetensors").read_bytes() == (
        tmp_path / "wanted" / "model.safetensors"
    ).read_bytes()


def test_a_float_model_is_loaded_the_same_and_what_others_wrote_makes_it(setting, tmp_path):
    llama().save_pretrained(tmp_path)
    wanted = dict(w8a8.load(tmp_path).state_dict())
    with setting():
        found = dict(w8a8.load(tmp_path).state_dict())
    same(found, wanted)


@pytest.mark.parametrize("make", [pytest.param(marian, marks=pytest.mark.slow), codegen])
def test_tables_that_a_class_makes_itself_are_the_same(setting, tmp_path, make):
    model = make()
    w8a8.quantize(model)
    w8a8.save(model, tmp_path / "directory")

    def held():
        loaded = w8a8.load(tmp_path / "directory")
        return {**loaded.state_dict(), **dict(loaded.named_buffers())}

    wanted = held()
    with setting():
        found = held()
    same(found, wanted)


def test_text_goes_on_the_same(setting):
    opened = demo_model()
    wanted = continue_text(opened, "Return a new", max_new_tokens=6).text
    with setting():
        found = continue_text(opened, "Return a new", max_new_tokens=6).text
    assert found == wanted


def test_a_layer_can_be_timed(setting):
    with setting():
        found = time_layer(64, rows=(2,), rounds=2)
    assert found.features == 64
    assert found.times[0].kernel in kernels.KERNELS


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_find_the_same_ranges(setting, name):
    x, spec = torch.randn(64, 20), QuantSpec(8, PerTensor(), symmetric=name != "minmax", dynamic=False)

    def measured():
        observer = OBSERVERS[name]()
        observer.update(x[:40])
        observer.update(x[40:])
        params = observer.params(spec)
        return {"scale": params.scale, "zero point": params.zero_point}

    wanted = measured()
    with setting():
        found = measured()
    same(found, wanted)
