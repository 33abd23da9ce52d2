"""Shapes and random weights of the tiny models' decoders."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from .tokenizer import VOCAB_SIZE, WORDS

HEAD_DIM, NUM_QO_HEADS, NUM_KV_HEADS = 128, 4, 2
HIDDEN_SIZE = HEAD_DIM * NUM_QO_HEADS
# Logits have this standard deviation; the best word then leads by about 2, far above bf16 noise.
HEAD_SCALE = 6.0
# Random queries and keys score near 0 against each other. Scaled up, attention picks out tokens,
# and the answer depends on what the keys of an image hold.
QUERY_KEY_SCALE = 1.5
# Real checkpoints have keys with a mean; a zero bias would hide a mean that is lost on the way.
QUERY_KEY_BIAS = 0.5


def decoder_shape(layers: int) -> dict[str, int]:
    """Configuration fields that all decoders share."""
    return dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=NUM_QO_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
    )


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill matrices so that unit-variance inputs give unit-variance outputs; norms keep their
    ones."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


@torch.no_grad()
def sharpen(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> None:
    """Make attention selective, and greedy decoding stable: the output head is zero but for one
    peaked row a word."""
    for name, parameter in model.named_parameters():
        if "visual" in name or "vision_tower" in name:
            continue
        # A norm of queries and keys undoes the scale of their projections, so it carries the scale
        # itself.
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")):
            parameter.mul_(QUERY_KEY_SCALE)
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * QUERY_KEY_BIAS)
    answers = torch.zeros(VOCAB_SIZE, 1, dtype=model.lm_head.weight.dtype)
    answers[tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in WORDS])] = HEAD_SCALE
    model.lm_head.weight.mul_(answers)
