"""Models that generate with a cache of ours, set by one call."""

import copy

import pytest
import torch
import transformers as t
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import w8a8
from tests.conftest import needs
from tests.decoding.models import CAUSAL, SIZES, causal, whisper, with_own_attention
from tests.decoding.test_caches import prompt
from w8a8.decoding import attention
from w8a8.decoding.models import new_cache, set_usual_cache
from w8a8.errors import ModelError

pytestmark = [
    pytest.mark.kernels,
    needs("native"),
    pytest.mark.not_under("meta", reason="transformers' `generate` makes its own tensors on the default device"),
]

FAST = ("mistral", "gemma2", "gpt_oss")  # a window; soft caps, and windows in turn; sinks
FAMILIES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CAUSAL]


@pytest.fixture
def answered(monkeypatch):
    """What the kernel answered: how many queries there were, and whether it could."""
    found = []

    def seen(q, *rest):
        answer = kernel(q, *rest)
        found.append((q.shape[2], answer is not None))
        return answer

    kernel = attention.attend
    monkeypatch.setattr(attention, "attend", seen)
    return found


@torch.inference_mode()
def written(model, new=12, **how):
    return model.generate(
        **prompt(), max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True, **how
    )


def apart(ours, theirs):
    """Of logits, the norm of the difference over the norm, at the worst token."""
    pairs = zip(ours.logits, theirs.logits, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["padded", "beams"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_writes_by_codes_what_it_writes_by_what_they_stand_for(name, how, answered):
    """Logits within 2e-3: a query's rounding moves a code of the next layer's keys now and then."""
    model = causal(name)
    w8a8.set_cache(model, "int8")
    by_codes = written(model, **how)
    assert answered == [(1, True)] * (model.config.num_hidden_layers * 11)
    model.set_attn_implementation("eager")
    by_floats = written(model, **how)
    assert torch.equal(by_codes.sequences, by_floats.sequences)
    assert 0 < apart(by_codes, by_floats) < 2e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_with_an_assistant_several_queries_at_once_run_by_codes(name, answered):
    model, assistant = causal(name), causal(name)
    w8a8.set_cache(model, "int8")
    ids = {key: value[1:] for key, value in prompt().items()}
    found = model.generate(**ids, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert found.shape[1] == 32
    assert {queries > 1 for queries, _ in answered} >= {True}
    assert all(could for _, could in answered)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_too(dtype, answered):
    model = causal("llama").to(dtype)
    wanted = written(model, new=2)
    w8a8.set_cache(model, "int8")
    assert apart(written(model, new=2), wanted) < 0.03
    assert answered == [(1, True)] * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_change_no_bit_and_dynamic_is_as_it_was(name):
    model = causal(name)
    own = model.config._attn_implementation
    wanted = written(model)
    for kind in ("block", "int8", "dynamic"):
        w8a8.set_cache(model, kind)
        assert (new_cache(model) is None) == (kind == "dynamic")
        if kind != "int8":
            found = written(model)
            assert torch.equal(found.sequences, wanted.sequences)
            assert all(map(torch.equal, found.logits, wanted.logits))
            assert model.config._attn_implementation == own
    assert "generate" not in vars(model)


def test_a_call_has_the_cache_that_it_asks_for(answered):
    model = causal("llama")
    model.generation_config.cache_implementation = "offloaded"  # what the model's file may ask for is not a call's wish
    w8a8.set_cache(model)
    own = DynamicCache(config=model.config)
    config = t.GenerationConfig(cache_implementation="dynamic")
    for how in ({"past_key_values": own}, {"use_cache": False}, {"generation_config": config}):
        written(model, **how)
        assert not answered
    assert own.get_seq_length() == 23
    model.generate(prompt()["input_ids"], t.GenerationConfig(max_new_tokens=3))
    assert answered == [(1, True)] * 4
    w8a8.set_cache(model, "dynamic")
    assert model.generation_config.cache_implementation == "offloaded"


@pytest.mark.parametrize("kind", ["block", "int8"])
def test_what_is_saved_asks_for_the_cache_that_the_model_asked_for(kind, tmp_path):
    model = causal("llama")
    model.generation_config.cache_implementation = "static"
    w8a8.set_cache(model, kind)
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "model")
    for place in ("copy", "model"):
        assert t.GenerationConfig.from_pretrained(tmp_path / place).cache_implementation == "static"
    assert model.generation_config.cache_implementation is None
    assert isinstance(written(model).past_key_values, w8a8.BlockCache)
    w8a8.set_cache(model, "dynamic")
    assert model.generation_config.cache_implementation == "static"
    assert not {"generate", "save_pretrained"} & vars(model).keys()


@pytest.mark.parametrize("kind", [None, 8, ["int8"], {"int8"}, b"int8"])
def test_a_kind_that_is_no_name_is_refused_in_words(kind):
    with pytest.raises(ModelError, match=r"a kind of cache is a name, found .*; use one of dynamic, block, int8"):
        w8a8.set_cache(causal("llama"), kind)


@pytest.mark.parametrize("kind", ["dynamic", "int8"])
def test_what_is_no_model_is_refused_in_words(kind):
    for wrong in (None, 3, "llama", t.LlamaForCausalLM):
        with pytest.raises(ModelError, match=r"was to be set for a model, found .*; pass the model itself"):
            w8a8.set_cache(wrong, kind)


def test_a_copy_generates_by_itself():
    model = causal("llama")
    w8a8.set_cache(model)
    other = copy.deepcopy(model)
    assert other.generate.__self__ is other
    w8a8.set_cache(other, "dynamic")
    assert new_cache(model) is not None
    assert model.state_dict().keys() == other.state_dict().keys()


def test_whisper_keeps_its_encoder_as_it_came(answered):
    model = whisper()
    mel = torch.randn(2, 8, 32)
    w8a8.set_cache(model)
    cache = new_cache(model)
    assert isinstance(cache, EncoderDecoderCache)
    assert type(cache.cross_attention_cache) is DynamicCache
    for how in ({}, {"num_beams": 3}):
        assert model.generate(mel, max_new_tokens=9, do_sample=False, **how).shape[0] == 2
    assert answered == [(1, True)] * len(answered)
    assert len(answered) >= 2 * 7


def test_attention_that_cannot_be_exchanged_is_told_and_the_cache_serves_it(answered):
    model = t.BloomForCausalLM(t.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)).eval()
    wanted = written(model, new=1)
    with pytest.warns(UserWarning, match="keeps its own attention"):
        w8a8.set_cache(model, "int8")
    assert 0 < apart(written(model, new=1), wanted) < 0.03
    written(model)
    assert not answered


def test_a_model_with_another_attention_than_transformers_keeps_it(monkeypatch):
    """Ours computes what PyTorch's does, and took its place unseen."""
    model = with_own_attention("llama", monkeypatch)
    with pytest.warns(UserWarning, match="keeps its own attention .logits by the other are"):
        w8a8.set_cache(model, "int8")
    assert model.config._attn_implementation == "flat"


def test_attention_of_a_part_that_is_none_is_left_alone():
    """MPT has a config for its attention, which names none until one is set: that could not be set again."""
    model = t.MptForCausalLM(t.MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4)).eval()
    with pytest.warns(UserWarning, match="keeps its own attention"):
        w8a8.set_cache(model, "int8")
    model.set_attn_implementation("eager")
    w8a8.set_cache(model, "dynamic")
    assert model.config._attn_implementation == "eager"


def test_a_deep_model_in_16_bits_has_attention_over_codes():
    """It kept its own where rounding brought more than a fixed distance."""
    torch.manual_seed(2)
    config = causal("gpt_oss").config
    config.num_hidden_layers, config.initializer_range, config.layer_types = 24, 0.3, config.layer_types * 12
    model = t.GptOssForCausalLM(config).eval().to(torch.bfloat16)
    w8a8.set_cache(model, "int8")
    assert model.config._attn_implementation == "w8a8"


@pytest.mark.parametrize("kind", ["block", "int8"])
def test_what_cannot_have_such_a_cache_is_refused_and_left_as_it_was(kind):
    jamba = t.JambaConfig(**SIZES, attn_layer_period=2, attn_layer_offset=1, intermediate_size=32, mamba_d_state=4)
    model = t.JambaForCausalLM(jamba)
    with pytest.raises(ModelError, match="keeps something else"):
        w8a8.set_cache(model, kind)
    assert "generate" not in vars(model)
    with pytest.raises(ModelError, match="no model of transformers that generates"):
        w8a8.set_cache(torch.nn.Linear(2, 2), kind)
    with pytest.raises(ModelError, match=r"unknown kind of cache 'int4' .* dynamic, block, int8"):
        w8a8.set_cache(model, "int4")
    own = causal("llama")
    own.generate = print
    with pytest.raises(ModelError, match="of its own beside its class's"):
        w8a8.set_cache(own, kind)


@pytest.mark.slow
def test_four_thousand_tokens_in_blocks_are_those_of_the_dynamic_cache():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = t.LlamaForCausalLM(
        t.LlamaConfig(**sizes, vocab_size=96, num_hidden_layers=1, max_position_embeddings=4200, eos_token_id=None)
    ).eval()
    ids, how = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 4000, "do_sample": True}
    texts = []
    for kind in ("dynamic", "block"):
        w8a8.set_cache(model, kind)
        torch.manual_seed(1)
        texts.append(model.generate(ids, **how))
    assert texts[0].shape[1] == 4003
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_values_usually_lie_in_blocks(name):
    model = causal(name)
    assert set_usual_cache(model) is None
    assert type(new_cache(model)) is w8a8.BlockCache


def _latent():
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(
            **{**SIZES, "num_hidden_layers": 1},
            **sizes,
            intermediate_size=40,
            num_key_value_heads=4,
            first_k_dense_replace=1,
        )
    )


def _state():
    return t.MambaForCausalLM(t.MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=1))


def test_a_model_with_another_kind_of_cache_keeps_its_own():
    model = _state().eval()
    why = set_usual_cache(model)
    assert why is not None
    assert new_cache(model) is None
    assert "generate" not in vars(model)


@pytest.mark.parametrize("kind", ["block", "int8"])
def test_latents_and_states_are_refused_before_anything_is_changed(kind):
    for model, why in ((_latent(), "latents"), (_state(), "something else")):
        model.eval()
        own = model.config._attn_implementation
        if _keeps_heads(model):
            continue  # this transformers keeps keys and values of DeepSeek's heads
        with pytest.raises(ModelError, match=why):
            w8a8.set_cache(model, kind)
        assert not {"generate", "_w8a8_cache"} & vars(model).keys()
        assert model.config._attn_implementation == own


def _keeps_heads(model):
    """Whether a token brings keys of all heads to transformers' own cache."""
    cache = DynamicCache(config=model.config)
    if not hasattr(model.config, "num_key_value_heads"):
        return False
    with torch.inference_mode():
        model(torch.tensor([[3]]), past_key_values=cache)
    return cache.layers[0].keys.shape[1] == model.config.num_key_value_heads


class Deaf(t.LlamaForCausalLM):
    """Keeps its own state, whatever it is given."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(input_ids=input_ids, use_cache=False, **kwargs)


class Picky(t.LlamaForCausalLM):
    """Takes one kind of cache."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        if past_key_values is not None and type(past_key_values) is not DynamicCache:
            raise TypeError("only my own")
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


class Pictured(t.LlamaForCausalLM):
    """Cannot be called with tokens alone."""

    def forward(self, input_ids=None, pixels=None, **kwargs):
        return super().forward(input_ids=input_ids + 0 * len(pixels), **kwargs)


@pytest.mark.parametrize(
    ("made", "why"), [(Deaf, "puts no keys and values into the cache"), (Picky, "not take it: TypeError: only my own")]
)
def test_a_model_that_does_not_take_the_cache_is_refused_before_anything_is_changed(made, why):
    model = made(causal("llama").config).eval()
    for kind in ("block", "int8"):
        with pytest.raises(ModelError, match=why):
            w8a8.set_cache(model, kind)
    assert "generate" not in vars(model)


def test_a_model_that_cannot_be_called_with_a_token_alone_is_not_judged_by_one():
    model = Pictured(causal("llama").config).eval()
    w8a8.set_cache(model)
    assert type(new_cache(model)) is w8a8.Int8Cache


def test_a_model_whose_latents_are_seen_when_they_come_keeps_its_own():
    model = _latent().eval()
    why = set_usual_cache(model)
    if why is None:
        assert type(new_cache(model)) is w8a8.BlockCache  # this transformers keeps keys and values of heads
    else:
        assert "latents" in why
        assert new_cache(model) is None


def test_a_model_that_would_say_something_else_keeps_its_own(monkeypatch):
    model = causal("llama")
    own = w8a8.BlockCache.update
    monkeypatch.setattr(w8a8.BlockCache, "update", lambda self, k, v, layer: own(self, k, 1.001 * v, layer))
    assert set_usual_cache(model) == "its logits are others with keys and values in blocks"
    assert new_cache(model) is None


def test_a_model_whose_code_wants_another_cache_keeps_its_own():
    model = Picky(causal("llama").config).eval()
    assert set_usual_cache(model) == "it does not go on from a few tokens: TypeError: only my own"
    assert new_cache(model) is None
