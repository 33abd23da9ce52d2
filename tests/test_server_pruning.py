"""Servers that keep fewer tokens of an image: the same ones whatever was cut, cached or sent beside
it."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from dataclasses import dataclass

import pytest
import requests
import torch
from chats import Chat, complete, connect, hold_chats, image_part
from dense_reference import (
    DenseChat,
    LlavaNextBackbone,
    LlavaNextPrompt,
    image_spans,
    load_backbone,
)
from dense_tower import class_token_scores, run_tower
from pictures import data_url, picture
from readers import ask
from soak import flush, rotatek_info
from test_server_requests import PLACEHOLDER, answer, generate, post, tokens
from transformers.image_processing_utils import select_best_resolution

from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.pruning.choice import Choice, union
from sglang_rotatek.pruning.selectors import LEAST_TOKENS, SELECTORS, kept_tokens
from sglang_rotatek.pruning.tiles import LEAST_OF_TILE
from sglang_rotatek.pruning.visionzip import select

pytestmark = pytest.mark.server
FLAGS = (
    "--dtype",
    "float32",
    "--max-total-tokens",
    "20000",
    "--enable-rotatek",
    "--rotatek-keep-tokens",
    "0.5",
    "--enable-metrics",
)
CHUNK = ("--chunked-prefill-size", "64")
PICTURES = 2
SIZE = (336, 336)
LOGPROB_ATOL = 1e-3  # float32 on both sides


@dataclass(frozen=True)
class Reader:
    """A trained model. ``tokens``: of a picture of SIZE, all and those that stay."""

    backbone: str
    tokens: tuple[int, int]

    @property
    def placeholder(self) -> tuple[str, str]:
        return PLACEHOLDER[self.backbone.removeprefix("reader_")]


READERS = (
    Reader("reader_qwen2_5_vl", (144, 72)),
    # The whole picture, two tiles of which half is padding, and 12 newlines.
    Reader("reader_llava_next", (144 + 144 + 12, 72 + 2 * 36 + 12)),
)


# Module scope makes pytest run all tests of one reader together, on one server.
@pytest.fixture(scope="module", params=READERS, ids=lambda reader: reader.backbone)
def reader(request) -> Reader:
    return request.param


@pytest.fixture
def url(servers, reader) -> str:
    return servers.get(reader.backbone, *FLAGS).url


def test_two_pictures_take_half_the_tokens_cold_and_warm_and_share_what_begins_alike(url, reader):
    (placeholder, _), kept = reader.placeholder, reader.tokens[1]
    text = f"{placeholder} and {placeholder} what?"
    flush(url)
    before = rotatek_info(url)
    images = [data_url(picture(seed, SIZE)) for seed in (1, 2, 3)]
    cold, warm, other = (
        json.loads(generate(url, text=text, image_data=pair)[1])
        for pair in (images[:2], images[:2], images[::2])
    )
    assert cold["meta_info"]["prompt_tokens"] == len(tokens(url, text)) - 2 + 2 * kept
    assert warm["meta_info"]["cached_tokens"] >= 2 * kept and warm["text"] == cold["text"]
    assert kept <= other["meta_info"]["cached_tokens"] < 2 * kept
    after = rotatek_info(url)
    assert after["tokens_pruned"] - before["tokens_pruned"] == 3 * (reader.tokens[0] - kept)
    assert after["tokens_compressed"] - before["tokens_compressed"] == 3 * kept


def test_a_prompt_of_expanded_placeholders_is_the_same_prompt(url, reader):
    (placeholder, token), (whole, kept) = reader.placeholder, reader.tokens
    image = data_url(picture(3, SIZE))
    ids, token_id = tokens(url, f"{placeholder} what?"), tokens(url, token)[0]
    at = ids.index(token_id)
    expanded = ids[:at] + [token_id] * whole + ids[at + 1 :]
    expected = answer(generate(url, input_ids=ids, image_data=image))
    assert answer(generate(url, input_ids=expanded, image_data=image)) == expected
    status, reason = generate(
        url, input_ids=ids[:at] + [token_id] * kept + ids[at + 1 :], image_data=image
    )
    assert status == 400 and f"picture 1 makes {whole} tokens" in reason


def test_answers_are_right_and_the_same_in_chunks_and_on_two_ranks(servers, reader, url):
    before = rotatek_info(url)
    alone = ask(url, pictures=PICTURES, concurrency=1)
    after = rotatek_info(url)
    kept, pruned = (after[name] - before[name] for name in ("tokens_compressed", "tokens_pruned"))
    assert 0 < pruned <= kept < 1.1 * pruned  # half, rounded up, and newlines
    # The other counts positions of what stays, so its rows have lengths which it has not learned;
    # and the dense reference has its chunks.
    if reader.backbone == "reader_qwen2_5_vl":
        assert sum(record.is_right for record in alone.values()) >= 0.8 * len(alone)
        chunked = servers.get(reader.backbone, *FLAGS, *CHUNK, "--rotatek-segment-tokens", "64").url
        together = ask(chunked, pictures=PICTURES, concurrency=3)
        assert rotatek_info(chunked)["segments_compressed"] > 3 * 3 * PICTURES
        # Which tokens of an image share a basis differs, which of it stay does not.
        same = [together[key].answer == record.answer for key, record in alone.items()]
        assert len(same) == 9 * PICTURES and sum(same) >= 0.9 * len(same)
    if torch.cuda.is_available() or len(os.sched_getaffinity(0)) < 2:
        return  # a rank needs a device of its own
    # The tower of the Qwen2.5-VL reader has 5 heads, which two ranks cannot share.
    encoder = ("--mm-enable-dp-encoder",) if "qwen" in reader.backbone else ()
    ranks = servers.get(reader.backbone, *FLAGS, *encoder, "--tp", "2").url
    two = ask(ranks, pictures=1, concurrency=1)
    assert len(two) == 9 and {key: record.answer for key, record in two.items()} == {
        key: alone[key].answer for key in two
    }


class PrunedPrompt:
    """A prompt of the dense reference without the tokens that are not chosen; the others stay where
    they were, but for LLaVA-NeXT, whose positions follow each other. choices: one of each
    picture."""

    def __init__(self, whole, choices: list[Choice]) -> None:
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
        if isinstance(self._whole, LlavaNextPrompt):  # 1-D: of what is left
            return self._whole.rope_positions(start, end)
        gone = len(self._whole.ids) - len(self.ids)
        if start >= len(self.ids):
            return self._whole.rope_positions(start + gone, end + gone)
        return self._whole.rope_positions(0, len(self._whole.ids))[:, :, self._stays[start:end]]


class PrunedBackbone:
    """``keep`` and ``pruner`` may change between prompts."""

    def __init__(self, model_dir) -> None:
        self._backbone = load_backbone(model_dir)
        self.tokenizer, self.model = self._backbone.tokenizer, self._backbone.model
        self.embed_token, self.forward = self._backbone.embed_token, self._backbone.forward
        self.keep, self.pruner = 1.0, "divprune"

    def prompt(self, messages) -> PrunedPrompt:
        whole = self._backbone.prompt(messages)
        spans = enumerate(image_spans(whole.ids))
        return PrunedPrompt(
            whole, [self._choose(whole, image, whole.embed(*span)) for image, span in spans]
        )

    def _choose(self, whole, image: int, features: torch.Tensor) -> Choice:
        """Of each group by itself; a token of no group stays."""
        groups = self._tiles if isinstance(self._backbone, LlavaNextBackbone) else self._grid
        groups, received, metric = groups(whole, image, len(features))
        stays, choices = torch.ones(len(features), dtype=torch.bool), []
        for group, least in groups:
            kept = kept_tokens(len(group), self.keep, least)
            if kept < len(group):
                stays[group] = False
                if self.pruner == "visionzip":
                    choices.append((group, select(kept, received[group], metric[group])))
                else:
                    hidden = features[group, : self.model.config.text_config.hidden_size]
                    stays[group[SELECTORS[self.pruner](hidden, kept)]] = True
        stays = stays.nonzero()[:, 0]
        return union(stays, choices, len(features)) if choices else Choice(stays)

    def _grid(self, whole, image: int, num_tokens: int) -> tuple:
        groups = [(torch.arange(num_tokens), LEAST_TOKENS)]
        if self.pruner != "visionzip":
            return groups, None, None
        run = run_tower(self.model.model.visual, whole.pixels, whole.grid)
        return groups, run.received[image], run.metric[image]

    def _tiles(self, whole, image: int, num_tokens: int) -> tuple:
        """By the place to which Transformers packs each tile's patches; newlines are in no
        group."""
        config, size = self.model.config, whole.sizes[image]
        tile = config.vision_config.image_size
        height, width = select_best_resolution(size, config.image_grid_pinpoints)
        marks = torch.arange(1 + height // tile * (width // tile)).float()
        scores = class_token_scores(
            self.model.model.vision_tower, whole.pixels[image][: len(marks)]
        )[:, 1:]
        marked = torch.cat((marks[:, None, None].expand(*scores.shape[:2], 1), scores), dim=-1)
        newline = torch.full((marked.shape[-1],), -1.0)
        ((packed,), _) = self.model.model.pack_image_features(
            [marked], torch.tensor([size]), "default", newline
        )
        assert len(packed) == num_tokens
        groups = [(packed[:, 0] == mark).nonzero()[:, 0] for mark in marks]
        groups = [
            (tokens, LEAST_OF_TILE if i else LEAST_TOKENS)
            for i, tokens in enumerate(groups)
            if len(tokens)
        ]
        return groups, packed[:, 1], packed[:, 2:]


@dataclass(frozen=True)
class Exact:
    """A server whose narrow rows are exact. ``too_small``: pictures of the test's chat that stay
    whole."""

    backbone: str
    pruner: str
    chunk: tuple[str, ...] = CHUNK
    too_small: int = 1

    @property
    def flags(self) -> tuple[str, ...]:
        rows = (
            "--rotatek-key-bits",
            "16",
            "--rotatek-keep-ratio",
            "1.0",
            "--rotatek-min-image-tokens",
            "8",
        )
        return (*FLAGS, *rows, "--rotatek-token-pruner", self.pruner, *self.chunk)


EXACT = (
    Exact("qwen2_5_vl", "divprune", chunk=()),
    pytest.param(Exact("qwen2_5_vl", "residual"), marks=pytest.mark.slow),
    pytest.param(
        Exact("qwen2_5_vl", "visionzip", chunk=(*CHUNK, "--tp", "2")), marks=pytest.mark.slow
    ),
    Exact("qwen2_vl", "visionzip"),
    Exact("qwen3_vl", "divprune", too_small=2),
    Exact("reader_llava_next", "divprune", chunk=(), too_small=0),
    Exact("llava_next_hf", "visionzip", too_small=0),
)


@pytest.fixture(scope="module", params=EXACT, ids=lambda exact: f"{exact.backbone}-{exact.pruner}")
def exact(request) -> Exact:
    return request.param


def test_a_server_equals_the_dense_reference_with_the_same_tokens(servers, models, exact):
    backbone, pruner = exact.backbone, exact.pruner
    url = servers.get(backbone, *exact.flags).url
    reference = PrunedBackbone(models[backbone])
    question = {"type": "text", "text": "What is in the picture?"}
    pictures = image_part(1, (112, 112)), image_part(7, (448, 336))
    chat = Chat(0, [[image_part(3, (336, 336)), question], [*pictures, question], [question]])
    flush(url)
    before = Counter(rotatek_info(url)["images_not_pruned"])
    asyncio.run(hold_chats(url, [chat], concurrency=1, max_tokens=8))
    dense = {
        keep: DenseChat(models[backbone], RowFormat(128, 16, 16), backbone=reference)
        for keep in (0.5, 1.0)
    }
    effect = 0.0
    for turn in chat.done:
        reference.keep, reference.pruner = 0.5, pruner
        token_ids, expected = dense[0.5].generate(turn.messages, len(turn.logprobs))
        assert turn.text == reference.tokenizer.decode(token_ids, skip_special_tokens=True), (
            f"turn {turn.number}"
        )
        assert turn.logprobs == pytest.approx(expected, abs=LOGPROB_ATOL), f"turn {turn.number}"
        reference.keep = 1.0
        whole = dense[1.0].turn(turn.messages, token_ids)
        effect = max(effect, *(abs(a - b) for a, b in zip(expected, whole, strict=True)))
    assert len(chat.done) == 3 and effect > 10 * LOGPROB_ATOL, "pruning changes nothing here"
    after = rotatek_info(url)["images_not_pruned"]
    assert Counter(after) - before == Counter(too_small=exact.too_small)
    lines = [
        line
        for line in requests.get(f"{url}/metrics", timeout=30).text.splitlines()
        if "rotatek_images_not_pruned{" in line
    ]
    gauges = {re.search('reason="(.+?)"', line)[1]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert gauges == after


def test_a_prompt_that_is_left_in_the_middle_of_a_picture_is_answered_the_next_time(servers, exact):
    if not exact.chunk:
        pytest.skip("a picture is computed at once")
    url = servers.get(exact.backbone, *exact.flags).url
    parts = [
        *(image_part(seed, (448, 448)) for seed in range(20, 28)),
        {"type": "text", "text": "What is it?"},
    ]
    messages = [{"role": "user", "content": parts}]
    for _ in range(5):  # until it is left neither before nor after its pictures
        flush(url)
        left = asyncio.run(leave_and_ask(url, messages))
        cached = left["usage"]["prompt_tokens_details"]["cached_tokens"]
        if 0 < cached < left["usage"]["prompt_tokens"] - 64:
            break
    else:
        pytest.fail("it was always left before, or after, its pictures")
    flush(url)
    cold = asyncio.run(leave_and_ask(url, messages, leave=False))
    logprobs = [
        [token["logprob"] for token in reply["choices"][0]["logprobs"]["content"]]
        for reply in (left, cold)
    ]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=LOGPROB_ATOL)


async def leave_and_ask(url: str, messages: list[dict], leave: bool = True) -> dict:
    """The answer, after the same question was sent and given up once some chunks were computed."""
    async with connect(url) as client:
        if leave:
            start = rotatek_info(url)["segments_compressed"]
            asked = asyncio.create_task(complete(client, messages, 8))
            while (
                await asyncio.to_thread(lambda: rotatek_info(url)["segments_compressed"])
                < start + 3
            ):
                if asked.done():
                    break  # the chunks came too fast to leave between them
            # Hanging up is noticed seconds later.
            status, _ = await asyncio.to_thread(post, url, "/abort_request", {"abort_all": True})
            assert status == 200
            await asyncio.gather(asked, return_exceptions=True)
        return await complete(client, messages, 8)
