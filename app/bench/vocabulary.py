"""The words of the picture book and the tokenizer that knows them: one token a word, so that a word is a column of
an attention map.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .backgrounds import BACKGROUNDS
from .shapes import COLOURS, SHAPES
from .styles import STYLES

LENGTH = 20  # three things, background and style take 18 tokens with the two marks
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "and", ",", "style", *COLOURS, *SHAPES, *BACKGROUNDS, *STYLES]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: case is ignored, "an" is "a", a comma needs no blank before it, other words are <unk>."""
    numbers = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\ban\b"), "a")])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", numbers["<s>"]), ("</s>", numbers["</s>"])]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )
