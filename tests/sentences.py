"""Tiny random models of sentence-transformers, of each architecture that people embed and rank with, made here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn

_WORDS = (
    "a an and at bird boat cat city cloud cold day dog eats every fast field fish green hill in is it "
    "lake late long man moon near night of old on river road runs sea sings sits slow small snow some "
    "stone sun swims the tree under warm wind wood"
)
WORDS = _WORDS.split()
SENTENCES = [
    "the cat sits on the old stone",
    "a dog runs in the green field near the river",
    "snow",
    "every bird sings at night under the moon",
    "it is late and the city is cold and some man runs on a long road",
    "fish swims",
]
"""Of several lengths, so that a batch of them is padded."""

_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
_SIZES = {
    "vocab_size": len(_SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tokenizer() -> Any:
    """Words and special tokens, one id each, as BERT frames them."""
    known = {word: number for number, word in enumerate([*_SPECIAL, *WORDS])}
    made = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    frame = [("[CLS]", known["[CLS]"]), ("[SEP]", known["[SEP]"])]
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=frame
    )
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}
    special = {f"{key}_token": name for key, name in names.items()}
    return t.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=60, **special)


def bert(**more: Any) -> Any:
    return t.BertConfig(**_SIZES, **more)


def mpnet(**more: Any) -> Any:
    return t.MPNetConfig(**_SIZES, **more)


def xlm_roberta(**more: Any) -> Any:
    return t.XLMRobertaConfig(**_SIZES, type_vocab_size=2, **more)


def modernbert(**more: Any) -> Any:
    special = {"cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
    return t.ModernBertConfig(**_SIZES, **special, local_attention=8, **more)


def qwen3(**more: Any) -> Any:
    return t.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2, **more)


CONFIGS: dict[str, Callable[..., Any]] = {make.__name__: make for make in (bert, mpnet, xlm_roberta, modernbert, qwen3)}


def write(directory: Path, auto: Any, config: Any) -> Path:
    """A directory of transformers with a random model whose outputs differ between sentences, and the tokenizer."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def embedder(place: Path, name: str = "bert", *, pooling: str = "cls", dense: bool = False) -> SentenceTransformer:
    """A `SentenceTransformer` with prompts and normalised embeddings.

    Args:
        place: A folder for the files that its modules are made from.
        name: Of `CONFIGS`.
        pooling: "cls", "mean", or "lasttoken".
        dense: With a linear layer behind the pooling.
    """
    modules: list[nn.Module] = [Transformer(str(write(place / f"{name}-model", t.AutoModel, CONFIGS[name]())))]
    modules.append(Pooling(modules[0].get_embedding_dimension(), pooling_mode=pooling))
    if dense:
        torch.manual_seed(1)
        modules.append(Dense(in_features=32, out_features=24))
    modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu", prompts={"query": "the cat ", "document": ""})


def ranker(place: Path, name: str = "bert", *, labels: int = 1) -> CrossEncoder:
    """A `CrossEncoder`."""
    config = CONFIGS[name](num_labels=labels)
    path = write(place / f"{name}-ranker", t.AutoModelForSequenceClassification, config)
    return CrossEncoder(str(path), device="cpu")
