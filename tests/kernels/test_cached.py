"""Keys and values in int8: the layout, the contract, and attention over them beside its plain version."""

import pytest
import torch

from tests.conftest import needs
from w8a8.core.scheme import PerToken, QuantSpec
from w8a8.core.tokens import quantize_tokens
from w8a8.kernels import cached, compiled
from w8a8.kernels.cached import Asked

pytestmark = [pytest.mark.kernels, needs("native")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(batch, heads, tokens, dims, dtype=torch.float32, *, by_token=False):
    """(B, H, T, D); by_token as a projection leaves them, the heads of a token side by side."""
    if by_token:
        return torch.randn(batch, tokens, heads, dims).to(dtype).transpose(1, 2)
    return torch.randn(batch, heads, tokens, dims).to(dtype)


def room_for(keys, values, room):
    codes = cached.empty(*keys.shape[:2], room, keys.shape[3], values.shape[3], keys.device)
    for tensor in codes[:4]:
        tensor.fill_(-77)
    return codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dims", "value_dims"), [(64, 64), (1, 17), (33, 16), (80, 128)])
def test_every_instruction_set_writes_and_reads_what_the_plain_version_does(every_isa, dims, value_dims, dtype):
    keys, values = states(2, 3, 50, dims, dtype, by_token=True), states(2, 3, 50, value_dims, dtype)
    wanted = room_for(keys, values, 80)
    cached.plain_append(wanted, keys, values, 13)

    def written():
        codes = room_for(keys, values, 80)
        assert compiled.loaded().cached_append(codes, keys, values, 13)
        read = [
            read(codes, first, last, dtype)
            for read in (cached.keys_of, cached.values_of)
            for first, last in ((13, 63), (13, 14), (31, 33), (16, 48), (20, 20))
        ]
        return codes, read

    plain = [
        read(wanted, first, last, dtype)
        for read in (cached.plain_keys, cached.plain_values)
        for first, last in ((13, 63), (13, 14), (31, 33), (16, 48), (20, 20))
    ]
    for codes, read in every_isa(written):
        assert all(map(torch.equal, codes[:4], wanted[:4]))
        assert all(map(torch.equal, read, plain))


def test_codes_are_those_of_the_contract():
    keys, values = states(1, 2, 9, 12), states(1, 2, 9, 20)
    codes = room_for(keys, values, 16)
    cached.append(codes, keys, values, 0)
    by_contract = quantize_tokens(values.reshape(-1, 20), QuantSpec(granularity=PerToken()))
    wanted = (by_contract.codes * by_contract.scale).view(values.shape)
    assert torch.equal(cached.values_of(codes, 0, 9, torch.float32), wanted)
    scale = codes.key_scale[:, :, :9, None]
    wanted = cached.rotated(torch.round(cached.rotated(keys) / scale)) * (scale / 4)
    assert torch.equal(cached.keys_of(codes, 0, 9, torch.float32), wanted)


@pytest.mark.parametrize("dims", [1, 8, 24, 64])
def test_the_scale_of_a_key_is_the_best_of_sixteen(dims):
    keys = states(1, 2, 60, dims)
    codes = room_for(keys, keys, 64)
    cached.append(codes, keys, keys, 0)
    turned = cached.rotated(keys).double()
    top = turned.abs().amax(-1, keepdim=True)
    off = [(turned - torch.round(turned / (top / n)) * (top / n)).square().sum(-1) for n in range(127, 111, -1)]
    best = torch.stack(off).amin(0)
    scale = codes.key_scale[:, :, :60, None].double()
    found = (turned - torch.round(turned / scale) * scale).square().sum(-1)
    assert (found <= best + 1e-4 * off[0] + 1e-12).all()
    steps = (top / scale).round().squeeze(-1)
    assert ((steps >= 112) & (steps <= 127)).all()
    assert dims == 1 or not (steps == 127).all()


@pytest.mark.parametrize("power", [-100, -40, 0, 40, 100])
def test_codes_of_a_key_do_not_depend_on_its_magnitude(every_isa, power):
    keys = states(1, 2, 30, 24)
    wanted = room_for(keys, keys, 32)
    cached.plain_append(wanted, keys, keys, 0)

    def written():
        codes = room_for(keys, keys, 32)
        cached.append(codes, keys * 2.0**power, keys, 0)
        return codes

    for codes in every_isa(written):
        assert torch.equal(codes.key_codes, wanted.key_codes)


def test_keys_at_the_ends_of_the_range_are_the_same_everywhere(every_isa):
    keys = torch.zeros(1, 1, 6, 8)
    keys[0, 0, 1] = 1e-38
    keys[0, 0, 2, 3] = 3e-37
    keys[0, 0, 3, :2] = torch.tensor([3e-37, 1e-39])
    keys[0, 0, 4] = 3e37 * torch.rand(8)
    keys[0, 0, 5, 0] = 3e38
    wanted = room_for(keys, keys, 16)
    cached.plain_append(wanted, keys, keys, 0)

    def written():
        codes = room_for(keys, keys, 16)
        cached.append(codes, keys, keys, 0)
        return codes

    for codes in every_isa(written):
        assert all(map(torch.equal, codes[:2], wanted[:2]))


@pytest.mark.parametrize("dims", [1, 2, 8, 12, 33, 48, 64, 80, 512])
def test_what_is_rotated_twice_is_what_it_was_and_products_stay(dims):
    x, y = torch.randint(-127, 128, (2, 5, dims)).float()  # of whole numbers all sums are exact
    block = cached.block_of(dims)
    assert dims % block == 0
    assert dims // block % 2 == 1
    assert torch.equal(cached.rotated(cached.rotated(x)), block * x)
    assert torch.equal((cached.rotated(x) * cached.rotated(y)).sum(-1), block * (x * y).sum(-1))


def test_a_channel_that_towers_over_the_others_leaves_them_their_bits():
    keys = states(1, 2, 40, 64)
    keys[..., 5] += 60
    codes = room_for(keys, keys, 48)
    cached.append(codes, keys, keys, 0)
    keys_off, values_off = (
        (read(codes, 0, 40, torch.float32) - keys).norm() for read in (cached.keys_of, cached.values_of)
    )
    assert keys_off < 0.3 * values_off  # 64 / 8 of absmax, and what random numbers add


@pytest.mark.parametrize("dims", [8, 33, 64])
def test_a_key_is_off_by_half_of_its_scale_at_most(dims):
    keys = states(1, 2, 40, dims) * torch.rand(40, 1).exp()
    codes = room_for(keys, keys, 48)
    cached.append(codes, keys, keys, 0)
    off = (cached.keys_of(codes, 0, 40, torch.float32) - keys).abs().amax(-1)
    assert (off <= 0.50001 * codes.key_scale[:, :, :40]).all()


def test_a_token_that_is_not_finite_is_nan_and_no_other():
    keys, values = states(1, 1, 6, 8), states(1, 1, 6, 8)
    keys[0, 0, 2, 3], values[0, 0, 4, 0] = torch.nan, torch.inf
    codes = room_for(keys, values, 16)
    cached.append(codes, keys, values, 0)
    assert cached.keys_of(codes, 0, 6, torch.float32).isnan().all(-1).flatten().tolist() == [i == 2 for i in range(6)]
    assert cached.values_of(codes, 0, 6, torch.float32).isnan().all(-1).flatten().tolist() == [i == 4 for i in range(6)]


def mask_of(kind, batch, heads, queries, keys):
    match kind:
        case "none":
            return None
        case "seen":
            return torch.rand(batch, 1, queries, keys) > 0.3
        case "added":
            return torch.randn(1, heads, queries, keys)
        case "hidden":
            return (torch.rand(batch, 1, 1, keys) > 0.3).float().log()


MASKS = ["none", "seen", "added", "hidden"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("shared", "queries", "dims", "value_dims", "keys", "start"),
    [
        (1, 1, 64, 64, 1, 0),
        (8, 1, 64, 64, 700, 5),
        (1, 5, 33, 17, 40, 16),
        (3, 2, 128, 16, 1100, 30),
        (7, 4, 2, 96, 513, 0),
    ],
)
@pytest.mark.parametrize("more", ["plain", "causal", "soft cap", "sinks", "causal, soft cap, sinks"])
def test_attention_is_within_its_bound_and_the_same_bits_everywhere(
    every_isa, shared, queries, dims, value_dims, keys, start, mask, more
):
    heads, batch = 2, 2
    k, v = states(batch, heads, start + keys, dims), states(batch, heads, start + keys, value_dims)
    codes = room_for(k, v, (start + keys + 40) // 16 * 16)
    cached.append(codes, k, v, 0)
    q = 3 * states(batch, heads * shared, queries, dims)
    asked = Asked(
        dims**-0.5,
        mask_of(mask, batch, heads * shared, queries, keys),
        causal="causal" in more and queries <= keys,
        softcap=5.0 if "soft cap" in more else None,
        sinks=torch.randn(heads * shared) if "sinks" in more else None,
    )
    wanted = cached.plain_attend(q, codes, start, start + keys, asked)
    found = every_isa(lambda: cached.attend(q, codes, start, start + keys, asked))
    assert found[0].shape == (batch, queries, heads * shared, value_dims)
    assert all(torch.equal(found[0], other) for other in found)
    assert (found[0] - wanted).abs().max() <= 4e-6 * v.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    k, v, q = states(1, 2, 90, 64, dtype), states(1, 2, 90, 64, dtype), states(1, 4, 1, 64, dtype)
    codes = room_for(k, v, 96)
    cached.append(codes, k, v, 0)
    exact = cached.attend(q.float(), codes, 0, 90, Asked(0.125))
    assert torch.equal(cached.attend(q, codes, 0, 90, Asked(0.125)), exact.to(dtype))


def test_what_rounding_the_query_adds_is_small_beside_what_rounding_the_keys_does():
    k, v, q = states(1, 4, 600, 64), states(1, 4, 600, 64), 2 * states(1, 8, 1, 64)
    codes = room_for(k, v, 608)
    cached.append(codes, k, v, 0)
    scale = 0.125

    def by_float(keys, values):
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=True)

    exact = by_float(k, v).transpose(1, 2)
    rounded = by_float(cached.keys_of(codes, 0, 600, k.dtype), cached.values_of(codes, 0, 600, k.dtype)).transpose(1, 2)
    found = cached.attend(q, codes, 0, 600, Asked(scale))
    assert (found - rounded).norm() < 0.01 * (rounded - exact).norm()


def test_a_query_that_sees_no_key_gives_zeros_and_a_hidden_key_may_be_anything():
    k, v, q = states(1, 1, 40, 8), states(1, 1, 40, 8), states(1, 2, 1, 8)
    k[..., 7, 0] = v[..., 9, 0] = torch.nan
    codes = room_for(k, v, 48)
    cached.append(codes, k, v, 0)
    nothing = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    assert (cached.attend(q, codes, 0, 40, Asked(1.0, nothing)) == 0).all()
    some = ~nothing
    some[..., [7, 9]] = False
    assert cached.attend(q, codes, 0, 40, Asked(1.0, some)).isfinite().all()
    assert cached.attend(q, codes, 0, 40, Asked(1.0)).isnan().all()


def test_a_query_that_is_not_finite_is_nan_and_no_other():
    k, v, q = states(1, 1, 40, 8), states(1, 1, 40, 8), states(1, 2, 1, 8)
    q[0, 1, 0, 3] = torch.inf
    codes = room_for(k, v, 48)
    cached.append(codes, k, v, 0)
    found = cached.attend(q, codes, 0, 40, Asked(1.0))
    assert found[0, 0, 0].isfinite().all()
    assert found[0, 0, 1].isnan().all()


def test_what_the_kernel_cannot_read_it_does_not_answer():
    k, v, q = states(1, 2, 20, 8), states(1, 2, 20, 8), states(1, 4, 1, 8)
    codes = room_for(k, v, 32)
    cached.append(codes, k, v, 0)
    assert cached.attend(q, codes, 0, 20, Asked(1.0)) is not None
    for wrong in (q.double(), q[..., :6], q[:, :3], q.expand(2, -1, -1, -1), q.to_sparse()):
        assert cached.attend(wrong, codes, 0, 20, Asked(1.0)) is None
    for start, end in ((0, 33), (5, 5), (-1, 4)):
        assert cached.attend(q, codes, start, end, Asked(1.0)) is None
    for mask in (torch.zeros(1, 1, 1, 19), torch.zeros(20), torch.zeros(1, 1, 1, 20, dtype=torch.int32)):
        assert cached.attend(q, codes, 0, 20, Asked(1.0, mask)) is None
    assert cached.attend(q, codes, 0, 20, Asked(1.0, sinks=torch.zeros(3))) is None
    assert cached.attend(q, codes._replace(key_codes=codes.key_codes[..., :1]), 0, 20, Asked(1.0)) is None
    functions = compiled.loaded()
    assert functions.cached_append(codes, k, v, 13) is None
    assert functions.cached_append(codes, k, v[:, :, :3], 0) is None
    assert functions.cached_read(codes, 30, True, torch.empty(1, 2, 3, 8)) is None


def test_without_the_kernel_the_plain_versions_answer(monkeypatch):
    keys, values = states(2, 2, 30, 10), states(2, 2, 30, 12)
    wanted, found = (room_for(keys, values, 32) for _ in range(2))
    cached.append(wanted, keys, values, 1)
    monkeypatch.setattr(cached, "library", lambda: "it is not there")
    cached.append(found, keys, values, 1)
    assert all(map(torch.equal, found[:4], wanted[:4]))
    assert torch.equal(cached.keys_of(found, 1, 31, torch.float32), cached.plain_keys(found, 1, 31, torch.float32))
    assert cached.attend(keys[:, :, :1], found, 1, 31, Asked(1.0)) is None
