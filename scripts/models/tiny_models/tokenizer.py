"""The tokenizer of the tiny models: a byte-level BPE trained on a list of common words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
WORDS = (
    "a the and or in on at of to is are it this that two three four five red green blue yellow "
    "white black orange purple grey dark bright small large round square circle triangle line star "
    "box word text picture image page chart table map street house tree river sky sun moon cloud "
    "bird cat dog boat car train left right top bottom middle corner above below behind near with "
    "without one many few some shows holds says"
).split()
SENTENCES = [
    "You are a helpful assistant.",
    "What is in this picture?",
    "Describe the image in one sentence.",
    "Which colour is the largest shape?",
    "Here is a second picture. What has changed?",
    "system user assistant USER: ASSISTANT:",
]


def make_tokenizer(
    out: Path, specials: list[str], chat_template: str, **token_roles: str
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which each of WORDS (with its leading space) is one token; save it
    to `out`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([" " + " ".join(WORDS), *SENTENCES], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=specials, **token_roles
    )
    tokenizer.chat_template = chat_template
    tokenizer.model_max_length = 32768
    tokenizer.save_pretrained(out)
    return tokenizer
