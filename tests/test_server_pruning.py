"""Servers that keep fewer tokens of an image: the same ones whatever was cut, cached or sent beside it."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from chats import Chat, hold_chats, image_part
from dense_reference import DenseChat, QwenBackbone, QwenPrompt, image_spans
from dense_tower import run_tower
from pictures import data_url, picture
from readers import ask
from soak import flush, rotatek_info
from test_server_requests import PLACEHOLDER, answer, generate, tokens

from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.pruning.choice import Choice
from sglang_rotatek.pruning.selectors import SELECTORS, kept_tokens
from sglang_rotatek.pruning.visionzip import select

pytestmark = pytest.mark.server
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000", "--enable-rotatek", "--rotatek-keep-tokens", "0.5")
CHUNKS = ("--rotatek-segment-tokens", "64", "--chunked-prefill-size", "64")
PICTURES = 2
LOGPROB_ATOL = 1e-3  # float32 on both sides


@pytest.fixture
def url(servers) -> str:
    return servers.get("reader_qwen2_5_vl", *FLAGS).url


def test_answers_are_right_and_the_same_in_chunks_and_in_company(servers, url):
    before = rotatek_info(url)
    alone = ask(url, pictures=PICTURES, concurrency=1)
    after = rotatek_info(url)
    kept, pruned = (after[name] - before[name] for name in ("tokens_compressed", "tokens_pruned"))
    assert 0 <= kept - pruned <= 3 * PICTURES  # half of each image, rounded up
    assert sum(record.is_right for record in alone.values()) >= 0.8 * len(alone)
    chunked = servers.get("reader_qwen2_5_vl", *FLAGS, *CHUNKS).url
    together = ask(chunked, pictures=PICTURES, concurrency=3)
    assert rotatek_info(chunked)["segments_compressed"] > 3 * 3 * PICTURES
    # Which tokens of an image share a basis differs, which of it stay does not.
    same = [together[key].answer == record.answer for key, record in alone.items()]
    assert len(same) == 9 * PICTURES and sum(same) >= 0.9 * len(same)


def test_two_pictures_take_half_the_tokens_cold_and_warm(url):
    placeholder = PLACEHOLDER["qwen2_5_vl"][0]
    flush(url)
    images = [data_url(picture(seed, (448, 448))) for seed in (1, 2)]
    cold, warm = (
        json.loads(generate(url, text=f"{placeholder} and {placeholder} what?", image_data=images)[1]) for _ in range(2)
    )
    text = len(tokens(url, f"{placeholder} and {placeholder} what?")) - 2
    assert cold["meta_info"]["prompt_tokens"] == text + 2 * 128  # of 16 x 16
    assert warm["meta_info"]["cached_tokens"] >= 2 * 128 and warm["text"] == cold["text"]


def test_a_prompt_of_expanded_placeholders_is_the_same_prompt(url):
    placeholder, token = PLACEHOLDER["qwen2_5_vl"]
    image = data_url(picture(3, (448, 448)))
    ids, token_id = tokens(url, f"{placeholder} what?"), tokens(url, token)[0]
    at = ids.index(token_id)
    expanded = ids[:at] + [token_id] * 256 + ids[at + 1 :]
    expected = answer(generate(url, input_ids=ids, image_data=image))
    assert answer(generate(url, input_ids=expanded, image_data=image)) == expected
    status, reason = generate(url, input_ids=ids[:at] + [token_id] * 128 + ids[at + 1 :], image_data=image)
    assert status == 400 and "picture 1 makes 256 tokens" in reason


class PrunedPrompt:
    """A prompt of the dense reference without the tokens that are not chosen; the others stay where they were.
    choices: one of each picture."""

    def __init__(self, whole: QwenPrompt, choices: list[Choice]) -> None:
        stays: list[int] = []
        embeds: list[torch.Tensor] = []
        at = 0
        for choice, (start, end) in zip(choices, image_spans(whole.ids), strict=True):
            stays += [*range(at, start), *(start + choice.tokens).tolist()]
            embeds += [whole.embed(at, start), choice.apply(whole.embed(start, end))]
            at = end
        self._stays = stays + list(range(at, len(whole.ids)))
        self._embeds = torch.cat([*embeds, whole.embed(at, len(whole.ids))])
        self._whole = whole
        self.ids = [whole.ids[i] for i in self._stays]

    def embed(self, start: int, end: int) -> torch.Tensor:
        return self._embeds[start:end]

    def rope_positions(self, start: int, end: int) -> torch.Tensor:
        gone = len(self._whole.ids) - len(self.ids)
        if start >= len(self.ids):
            return self._whole.rope_positions(start + gone, end + gone)
        return self._whole.rope_positions(0, len(self._whole.ids))[:, :, self._stays[start:end]]


class PrunedBackbone(QwenBackbone):
    keep, pruner = 1.0, "divprune"

    def prompt(self, messages) -> PrunedPrompt:
        whole = super().prompt(messages)
        run = run_tower(self.model.model.visual, whole.pixels, whole.grid)
        return PrunedPrompt(whole, [self.choose(*picture) for picture in zip(run.features, run.received, run.metric)])

    def choose(self, features: torch.Tensor, received: torch.Tensor, metric: torch.Tensor) -> Choice:
        kept = kept_tokens(len(features), self.keep)
        if kept == len(features):
            return Choice(torch.arange(kept))
        if self.pruner == "visionzip":
            return select(kept, received, metric)
        return Choice(SELECTORS[self.pruner](features, kept))


CHUNK = ("--chunked-prefill-size", "64")


@pytest.mark.parametrize(
    ("model", "pruner", "flags"),
    [
        ("qwen2_5_vl", "divprune", ()),
        ("qwen2_5_vl", "residual", CHUNK),
        ("qwen2_5_vl", "visionzip", ()),
        ("qwen2_5_vl", "visionzip", (*CHUNK, "--tp", "2")),
        ("qwen2_vl", "visionzip", CHUNK),
    ],
)
def test_a_server_equals_the_dense_reference_with_the_same_tokens(servers, models, model, pruner, flags):
    exact = ("--rotatek-key-bits", "16", "--rotatek-keep-ratio", "1.0", "--rotatek-min-image-tokens", "8")
    url = servers.get(model, *FLAGS, *exact, "--rotatek-token-pruner", pruner, *flags).url
    backbone = PrunedBackbone(models[model])
    question = {"type": "text", "text": "What is in the picture?"}
    pictures = image_part(1, (112, 112)), image_part(7, (448, 336))
    chat = Chat(0, [[image_part(3, (336, 336)), question], [*pictures, question], [question]])
    flush(url)
    asyncio.run(hold_chats(url, [chat], concurrency=1, max_tokens=8))
    dense = {keep: DenseChat(models[model], RowFormat(128, 16, 16), backbone=backbone) for keep in (0.5, 1.0)}
    effect = 0.0
    for turn in chat.done:
        tokens_of = backbone.tokenizer.encode(turn.text, add_special_tokens=False)
        assert len(tokens_of) == len(turn.logprobs), "the answer does not survive a round trip through its text"
        expected = {}
        for keep, reference in dense.items():
            backbone.keep, backbone.pruner = keep, pruner
            expected[keep] = reference.turn(turn.messages, tokens_of)
        assert turn.logprobs == pytest.approx(expected[0.5], abs=LOGPROB_ATOL), f"turn {turn.number}"
        effect = max(effect, *(abs(a - b) for a, b in zip(expected[0.5], expected[1.0])))
    assert len(chat.done) == 3 and effect > 10 * LOGPROB_ATOL, "pruning changes nothing here"
