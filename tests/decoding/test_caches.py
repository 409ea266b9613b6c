"""Generation with our caches beside `DynamicCache`."""

import copy

import pytest
import torch
import transformers as t
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import w8a8
from tests.conftest import crossed, named
from tests.decoding.models import CAUSAL, SIZES, VOCAB, causal, whisper
from w8a8 import BlockCache, Int8Cache
from w8a8.decoding.stores import BLOCK
from w8a8.errors import ModelError

PADDED = 5


def prompt():
    """(2, 12) ids, the first padded on the left, with their mask."""
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.inference_mode()
def written(model, cache, new=16, **how):
    return model.generate(
        **prompt(),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **how,
    )


def same(a, b):
    return torch.equal(a.sequences, b.sequences) and all(map(torch.equal, a.logits, b.logits))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_padded_batch_goes_on_to_the_bit_as_with_the_dynamic_cache(name):
    model = causal(name)
    assert same(written(model, BlockCache(model.config)), written(model, DynamicCache(config=model.config)))


@pytest.mark.parametrize("name", CAUSAL)
def test_beams_go_on_to_the_bit_as_with_the_dynamic_cache(name):
    model = causal(name)
    found = [written(model, cache, num_beams=3) for cache in (BlockCache(model.config), None)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(map(torch.equal, found[0].logits, found[1].logits))


@crossed("name cache", list(CAUSAL), [BlockCache, Int8Cache], ids=named)
def test_with_an_assistant_the_text_is_that_of_the_model_alone(name, cache):
    model, assistant = causal(name), causal(name)  # of other weights: much of what it proposes is wrong
    ids = {key: value[1:] for key, value in prompt().items()}
    how = {"max_new_tokens": 40, "do_sample": False}
    alone = model.generate(**ids, **how, past_key_values=cache(model.config))
    helped = model.generate(**ids, **how, past_key_values=cache(model.config), assistant_model=assistant)
    assert torch.equal(alone, helped)


@pytest.mark.parametrize("name", CAUSAL)
def test_int8_stays_near(name):
    """Logits within 2 %: what rounding keys and values to 127 steps leaves of two layers."""
    model = causal(name)
    ids = torch.randint(3, VOCAB, (2, 40))
    with torch.inference_mode():
        wanted = model(ids).logits
        found = model(ids, past_key_values=Int8Cache(model.config)).logits
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 0.02


def test_how_a_prompt_is_split_changes_nothing_that_is_kept():
    model = causal("llama")
    ids = torch.randint(3, VOCAB, (1, 30))
    at_once, in_parts = Int8Cache(model.config), Int8Cache(model.config)
    with torch.inference_mode():
        wanted = model(ids, past_key_values=at_once).logits[:, -1]
        for part in ids.split(7, 1):
            found = model(part, past_key_values=in_parts).logits[:, -1]
    torch.testing.assert_close(found, wanted)
    assert in_parts.get_seq_length() == 30


def test_a_cache_that_was_copied_goes_on_by_itself():
    model = causal("mistral")
    cache = Int8Cache(model.config)
    ids = torch.randint(3, VOCAB, (1, 20))
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        other = copy.deepcopy(cache)
        wanted = model(ids[:, :1], past_key_values=cache).logits
        model(ids[:, 1:], past_key_values=cache)
        assert torch.equal(model(ids[:, :1], past_key_values=other).logits, wanted)


def test_whisper_writes_to_the_bit_as_with_the_dynamic_cache():
    model = whisper()
    mel = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))

    def text(cache, **how):
        return model.generate(mel, past_key_values=cache, max_new_tokens=20, do_sample=False, **how)

    for how in ({}, {"num_beams": 3}):
        ours = EncoderDecoderCache(BlockCache(model.config), BlockCache(model.config))
        assert torch.equal(text(ours, **how), text(None, **how))
        int8 = EncoderDecoderCache(Int8Cache(model.config), Int8Cache(model.config))
        assert text(int8, **how).shape[0] == 2


def held_bytes(cache):
    """Of all tensors that a cache holds."""
    total = 0
    for layer in cache.layers:
        store = layer.store
        tensors = store.codes if isinstance(layer, w8a8.decoding.layers.Int8Layer) else vars(store).values()
        total += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
    return total


def test_eight_thousand_tokens_take_a_quarter_of_float32():
    config = t.LlamaConfig(**{**SIZES, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2})
    shape, sizes = (1, 2, 8190, 64), {}
    for kind in (BlockCache, Int8Cache):
        cache = kind(config)
        for layer in range(2):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
            for _ in range(2):
                cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), layer)
        assert cache.get_seq_length() == 8192
        sizes[kind] = held_bytes(cache)
    exact = 2 * 2 * 2 * 8192 * 64 * 4
    assert sizes[BlockCache] <= exact * (1 + BLOCK / 8192)
    assert sizes[Int8Cache] <= exact * (1 + BLOCK / 8192) * (1 / 4 + 1 / 64)  # a scale for 64 codes


@pytest.mark.parametrize("cache", [BlockCache, Int8Cache])
def test_a_state_space_model_is_refused_before_anything_is_kept(cache):
    config = t.JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)
    with pytest.raises(ModelError, match=r"layer 0 of the model keeps something else .*use transformers' DynamicCache"):
        cache(config)


@pytest.mark.parametrize("cache", [BlockCache, Int8Cache])
def test_what_is_no_config_is_refused(cache):
    with pytest.raises(ModelError, match=r"pass model\.config"):
        cache(causal("llama"))


@pytest.mark.parametrize("cache", [BlockCache, Int8Cache])
def test_a_config_of_what_keeps_nothing_is_refused(cache):
    for config in (t.ViTConfig(), t.BertConfig(), t.ModernBertConfig(), t.CLIPConfig()):
        with pytest.raises(ModelError, match=r"keeps no keys and values: .*; pass the config of a model that"):
            cache(config)
    with pytest.raises(ModelError, match="found the class LlamaConfig; pass model"):
        cache(t.LlamaConfig)
    with pytest.raises(ModelError, match="transformers has no cache for a ResNetConfig"):
        cache(t.ResNetConfig())


def test_whatever_decodes_has_a_cache_however_its_config_says_so():
    class Own(t.PretrainedConfig):
        """Of code from outside transformers, which says nothing of a cache."""

        num_hidden_layers: int = 1

    paired = t.EncoderDecoderConfig.from_encoder_decoder_configs(t.BertConfig(), t.BertConfig(num_hidden_layers=3))
    assert len(BlockCache(paired).layers) == 3
    assert len(BlockCache(t.BertConfig(is_decoder=True, num_hidden_layers=2)).layers) == 2
    for config in (t.GPTNeoXConfig(), t.T5Config(), t.BartConfig(), t.MusicgenDecoderConfig(), Own()):
        assert BlockCache(config).layers


def test_latents_of_heads_are_refused_when_the_first_come():
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = t.DeepseekV3Config(
        **{**SIZES, "num_hidden_layers": 1},
        **sizes,
        intermediate_size=40,
        num_key_value_heads=4,
        first_k_dense_replace=1,
    )
    model = t.DeepseekV3ForCausalLM(config).eval()
    probe = DynamicCache(config=config)
    with torch.inference_mode():
        model(torch.tensor([[3, 4]]), past_key_values=probe)
        if probe.layers[0].keys.shape[1] == config.num_key_value_heads:
            pytest.skip("this transformers keeps keys and values of heads, not latents")
        with pytest.raises(ModelError, match="latents"):
            model(torch.tensor([[3, 4]]), past_key_values=Int8Cache(config))
