"""Servers that keep fewer tokens of an image: the same ones whatever was cut, cached or sent beside it."""

from __future__ import annotations

import json

import pytest
from pictures import data_url, picture
from readers import ask
from soak import flush, rotatek_info
from test_server_requests import PLACEHOLDER, answer, generate, tokens

pytestmark = pytest.mark.server
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000", "--enable-rotatek", "--rotatek-keep-tokens", "0.5")
CHUNKS = ("--rotatek-segment-tokens", "64", "--chunked-prefill-size", "64")
PICTURES = 2


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
