"""A byte-level BPE tokenizer for Python source; decoding the ids of a text gives the same text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS, MASK = range(4)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>")
# A line break with the next line's indentation is one piece; a single space joins the word or the
# sign after it; digits stand alone.
PIECES = r"(?:\r?\n)+[ \t]*| ?[^\W\d]+|\d| ?[^\s\w]+|[ \t]+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` ids with merges learned from `texts`; ids 0 to 3 are pad, bos,
    eos and mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return plain_text_only(tokenizer)


def tokenizer_config(max_context: int) -> dict[str, Any]:
    """The tokenizer_config.json of such a tokenizer, by which transformers knows its special tokens
    and the longest context. Prompts of a batch are padded on the left, where output follows."""
    pad, bos, eos, mask = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "mask_token": mask,
        "model_max_length": max_context,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def plain_text_only(tokenizer: Tokenizer) -> Tokenizer:
    """Sets the tokenizer to read `<|eos|>` and the like in a text as plain characters; returns it.

    The setting is not part of tokenizer.json, so it has to be made again after loading.
    """
    tokenizer.encode_special_tokens = True
    return tokenizer
