"""Checkpoints as fidelity.py uses them: a prompt is prefilled exactly, and the tokens behind it are
read on a cache of which some Keys and Values were replaced.

A ``Trial`` is one such prompt. Its last queries are kept as the attention sees them, after RoPE:
what codes that look at queries are fitted with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tasks import FAMILIES, Picture, make_picture
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sglang_rotatek.basis import QUERY_WINDOW

LONGEST_ANSWER = 128  # tokens that protocol D lets the model say
Span = tuple[int, int]
# Told of each attention: its module, queries and Keys [B, H, S, D] after RoPE.
Seen = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], None]


@dataclass
class Trial:
    """``exact``: Keys and Values [1, H, start, D] of each layer; ``queries``: the last ones
    [w, Hq, D] of each layer. Tokens ``coded`` of the prompt are what an arm codes, ids[start:] is
    read behind it, and the tokens of each of ``spans`` are judged. ``has_answers``: a span is an
    answer, right or not."""

    exact: list[tuple[torch.Tensor, torch.Tensor]]
    queries: list[torch.Tensor]
    coded: Span
    ids: torch.Tensor
    start: int
    spans: list[Span]
    has_answers: bool = True


def observe_attention(config: PreTrainedConfig, name: str, seen: Seen) -> None:
    """``seen`` is told of every attention of the modules with ``config``, which becomes SDPA."""

    def attention(module, query, key, *args, **kwargs):
        seen(module, query, key)
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = name


class Model:
    """What text models and vision-language models share. ``model`` in fp32, with SDPA."""

    def __init__(self, model: torch.nn.Module, text_model: torch.nn.Module) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device).eval()
        self.text_model = text_model
        text = model.config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        self.head_dim = getattr(text, "head_dim", None) or hidden // heads
        self.num_layers, self.num_kv_heads = text.num_hidden_layers, text.num_key_value_heads
        self.on_attention: Seen | None = None
        self._queries: dict[int, torch.Tensor] = {}
        observe_attention(text_model.config, f"fidelity-{id(self)}", self._record_queries)

    def _record_queries(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor
    ) -> None:
        self._queries[module.layer_idx] = query[0, :, -QUERY_WINDOW:].transpose(0, 1).float()
        if self.on_attention:
            self.on_attention(module, query, key)

    def prefill(self, inputs: dict, length: int) -> tuple[DynamicCache, list, torch.Tensor]:
        """The cache of the first ``length`` tokens, each layer's last queries, and the logits
        [vocabulary] of the next token."""
        total = inputs["input_ids"].shape[1]
        cut = {
            name: value[:, :length] if value.ndim == 2 and value.shape[1] == total else value
            for name, value in inputs.items()
        }
        self._queries.clear()
        output = self.model(**cut, use_cache=True, logits_to_keep=1)
        queries = [self._queries[layer] for layer in range(len(output.past_key_values.layers))]
        return output.past_key_values, queries, output.logits[0, -1]

    def positions(self, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end, device=self.device)[None]

    def continue_from(self, cache: DynamicCache, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits [tokens from ``start`` on, vocabulary] fp32 of ids [tokens]; fills ``cache``."""
        hidden = self.text_model(
            input_ids=ids[None, start:],
            past_key_values=cache,
            position_ids=self.positions(start, len(ids)),
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden)[0].float()


def exact_of(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


class Checkpoint(Model):
    """A Qwen2.5-VL or LLaVA-NeXT checkpoint, and its prompts."""

    def __init__(self, path: str | Path) -> None:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        super().__init__(model, model.model.language_model)
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.name = Path(path).name
        config = model.config
        self.image_token = getattr(config, "image_token_id", None) or config.image_token_index
        self.has_mrope = hasattr(model.model, "rope_deltas")
        stop = model.generation_config.eos_token_id
        self.stop_tokens = set(stop if isinstance(stop, list) else [stop])

    def trials(self, protocol: str, pictures: int, seed: int, question: str) -> Iterator[Trial]:
        """``pictures`` trials of a protocol of fidelity.py. ``question``: what protocol D asks
        instead of the picture's own question with the longest answer."""
        families = list(FAMILIES)
        for number in range(pictures):
            picture = make_picture(families[number % len(families)], seed + number)
            if protocol == "D":
                longest = max(picture.questions, key=lambda one: len(one.answer))
                yield self.own_answer(picture, question or longest.text)
            else:
                yield self.true_answers(picture, after_first_question=protocol == "C")

    def true_answers(self, picture: Picture, *, after_first_question: bool) -> Trial:
        """Protocols B and C."""
        inputs, spans = self.render(picture)
        ids = inputs["input_ids"][0]
        coded = self.picture_span(ids)
        start = spans[0][0] if after_first_question else coded[1]
        spans = spans[1:] if after_first_question else spans
        cache, queries, _ = self.prefill(inputs, start)
        return Trial(exact_of(cache), queries, coded, ids, start, spans)

    def own_answer(self, picture: Picture, question: str) -> Trial:
        """Protocol D. The answer's first token comes from the exact prefill and is not judged."""
        messages = [self.user_turn(question, has_image=True)]
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        inputs = self.processor(text=[text], images=[picture.image], return_tensors="pt")
        inputs = inputs.to(self.device)
        ids = inputs["input_ids"][0]
        start = len(ids)
        cache, queries, logits = self.prefill(inputs, start)
        exact = exact_of(cache)
        while True:
            ids = torch.cat([ids, logits.argmax()[None]])
            if int(ids[-1]) in self.stop_tokens or len(ids) == start + LONGEST_ANSWER:
                break
            logits = self.continue_from(cache, ids, len(ids) - 1)[-1]
        spans = [(start + 1, len(ids))]
        return Trial(exact, queries, self.picture_span(ids), ids, start, spans)

    @staticmethod
    def user_turn(text: str, *, has_image: bool) -> dict:
        content = [{"type": "image"}] if has_image else []
        return {"role": "user", "content": [*content, {"type": "text", "text": text}]}

    def render(self, picture: Picture) -> tuple[dict, list[Span]]:
        """Model inputs of the picture's whole chat, and where each answer's tokens are in it."""
        messages = []
        for number, question in enumerate(picture.questions):
            messages.append(self.user_turn(question.text, has_image=number == 0))
            answer = [{"type": "text", "text": question.answer}]
            messages.append({"role": "assistant", "content": answer})
        text = self.processor.apply_chat_template(messages, tokenize=False)
        inputs = self.processor(text=[text], images=[picture.image], return_tensors="pt")
        num_tokens, spans = inputs["input_ids"].shape[1], []
        for turn, question in enumerate(picture.questions):
            before = self.processor.apply_chat_template(
                messages[: 2 * turn + 1], tokenize=False, add_generation_prompt=True
            )
            end = len(before) + len(question.answer)
            assert text.startswith(before) and text[len(before) : end] == question.answer
            behind = len(self.tokenizer.encode(text[end:], add_special_tokens=False))
            length = len(self.tokenizer.encode(question.answer, add_special_tokens=False))
            spans.append((num_tokens - behind - length, num_tokens - behind))
        return inputs.to(self.device), spans

    def embed(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """What the language model gets of a prompt: embeddings [S, hidden], pictures among them,
        and position ids, [3, S] where RoPE has three axes, else [1, S]."""
        given: dict = {}
        hook = self.text_model.register_forward_pre_hook(
            lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
        )
        try:
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        embeds = given["inputs_embeds"][0]
        if not self.has_mrope:
            return embeds, torch.arange(len(embeds), device=self.device)[None]
        return embeds, given["position_ids"][-3:, 0]

    def picture_span(self, ids: torch.Tensor) -> Span:
        is_image = (ids == self.image_token).nonzero()
        return int(is_image[0]), int(is_image[-1]) + 1

    def positions(self, start: int, end: int) -> torch.Tensor:
        positions = super().positions(start, end)
        if not self.has_mrope:
            return positions
        return (positions + int(self.model.model.rope_deltas.view(-1)[0])).expand(3, 1, -1)


class TextModel(Model):
    """A causal language model's directory; if it holds a GGUF file, that is what is loaded."""

    def __init__(self, path: str | Path) -> None:
        gguf = [file.name for file in sorted(Path(path).glob("*.gguf"))]
        source = {"gguf_file": gguf[0]} if gguf else {}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **source)
        super().__init__(model, model.model)
        self.tokenizer = AutoTokenizer.from_pretrained(path, **source)
        self.name = Path(gguf[0]).stem if gguf else Path(path).name

    def trials(self, texts: list[Path], prefix: int, scored: int) -> Iterator[Trial]:
        """The ``prefix`` first tokens of each file are one segment, but for the first of all, to
        which attention falls by default and which no image token ever is; each of the next
        ``scored`` is read, and what it expects behind it is judged. ValueError for a short file."""
        for file in texts:
            text = file.read_text(errors="ignore")
            ids = self.tokenizer(text, return_tensors="pt").input_ids[0].to(self.device)
            if len(ids) <= prefix + scored:
                raise ValueError(
                    f"{file} has {len(ids)} tokens, more than {prefix + scored} are needed: "
                    "take a longer text, or fewer tokens with --prefix and --scored"
                )
            ids = ids[: prefix + scored + 1]
            cache, queries, _ = self.prefill({"input_ids": ids[None]}, prefix)
            exact, spans = exact_of(cache), [(prefix + 1, len(ids))]
            yield Trial(exact, queries, (1, prefix), ids, prefix, spans, has_answers=False)
