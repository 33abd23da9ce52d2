"""What clients send wrong, or oddly, is answered or HTTP 400 with the reason; the server goes on
and holds nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator

import pytest
import requests
from pictures import data_url, flat_picture, picture
from PIL import Image
from soak import flush
from test_server_rotated import FLAGS, assert_nothing_is_lost, user

pytestmark = pytest.mark.server

SIZE = (336, 336)
SECONDS = 60
PICTURE = data_url(picture(1, SIZE))
OTHER = data_url(picture(2, (224, 280)))
# What a raw prompt writes for one picture, and the token that its features take.
PLACEHOLDER = {
    "qwen2_5_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"),
    "llava_next": ("<image>", "<image>"),
}

ROWS = {"llava_next": ("--rotatek-value-bits", "16"), "qwen2_5_vl": ("--rotatek-key-bits", "16")}


# The order makes test_server_rotated.py go on with the server that runs last.
@pytest.fixture(scope="module", params=["llava_next", "qwen2_5_vl"])
def backbone(request) -> str:
    return request.param


@pytest.fixture
def url(servers, backbone) -> Iterator[str]:
    url = servers.get(backbone, *ROWS[backbone], *FLAGS).url
    yield url
    assert_nothing_is_lost(url)
    assert chat(url, "hello")[0] == 200


@pytest.fixture
def placeholder(backbone) -> str:
    return PLACEHOLDER[backbone][0]


def post(url: str, path: str, body: dict) -> tuple[int, str]:
    """Status and text; requests.Timeout instead of waiting for ever."""
    response = requests.post(url + path, json=body, timeout=SECONDS)
    return response.status_code, response.text


def chat(url: str, *parts: dict | str, **fields) -> tuple[int, str]:
    body = {
        "model": "m",
        "messages": [user(*parts)],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
    }
    return post(url, "/v1/chat/completions", body | {"ignore_eos": True} | fields)


def generate(url: str, sampling: dict | None = None, **fields) -> tuple[int, str]:
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True} | (sampling or {})
    return post(url, "/generate", {"sampling_params": sampling} | fields)


def answer(reply: tuple[int, str]) -> str:
    """What the model said."""
    status, text = reply
    assert status == 200, text
    reply = json.loads(text)
    return reply["text"] if "text" in reply else reply["choices"][0]["message"]["content"]


def logprobs(reply: tuple[int, str]) -> list[float]:
    status, text = reply
    assert status == 200, text
    return [token["logprob"] for token in json.loads(text)["choices"][0]["logprobs"]["content"]]


def assert_refused(reply: tuple[int, str], reason: str) -> None:
    status, text = reply
    assert status == 400, (status, text)
    assert re.search(reason, text), text


def image(address: str) -> dict:
    return {"type": "image_url", "image_url": {"url": address}}


def tokens(url: str, text: str) -> list[int]:
    status, reply = post(
        url, "/tokenize", {"model": "m", "prompt": text, "add_special_tokens": False}
    )
    assert status == 200, reply
    return json.loads(reply)["tokens"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_chat_that_quotes_placeholders_keeps_its_picture_in_place(url, backbone, order):
    block, token = PLACEHOLDER[backbone]
    quoted = f"what is {token} or {block}?"
    found = []
    for text in (quoted, quoted.replace("<", "< ")):
        parts = (text, image(PICTURE)) if order == "before" else (image(PICTURE), text)
        flush(url)
        found.append(logprobs(chat(url, *parts)))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_placeholders_in_every_role_and_without_a_picture_are_text(url, backbone):
    block, token = PLACEHOLDER[backbone]
    said = {"role": "assistant", "content": f"it shows {block}"}
    messages = [user("describe"), said, user(image(PICTURE), f"no {token}?")]
    assert chat(url, messages=messages)[0] == 200
    assert chat(url, f"what is {block}?")[0] == 200
    assert generate(url, text=f"what is {block}?")[0] == 200


def test_a_raw_prompt_whose_placeholders_do_not_match_its_pictures_is_refused(url, backbone):
    block, token = PLACEHOLDER[backbone]
    for text in (f"{block} what is {token}?", f"what is {token}? {block}", f"{block}{block} what?"):
        assert_refused(generate(url, text=text, image_data=PICTURE), "placeholder")
    assert_refused(generate(url, text="what is it?", image_data=PICTURE), "placeholder")
    assert_refused(generate(url, text=f"{block} what?", image_data=[PICTURE, OTHER]), "placeholder")


def test_pictures_of_a_raw_prompt_are_all_taken(url, backbone, placeholder):
    both = json.loads(
        generate(url, text=f"{placeholder}{placeholder} what?", image_data=[PICTURE, OTHER])[1]
    )
    marked = {"modalities": ["multi-images", "multi-images"]}
    again = generate(
        url, text=f"{placeholder}{placeholder} what?", image_data=[PICTURE, OTHER], **marked
    )
    assert answer(again) == both["text"]
    assert (
        json.loads(again[1])["meta_info"]["prompt_tokens"]
        == both["meta_info"]["prompt_tokens"]
        > 180
    )


def test_a_picture_may_be_an_address_with_options(url, placeholder):
    prompt = f"{placeholder} what?"
    reply = generate(
        url, text=prompt, image_data=[{"url": PICTURE, "detail": "auto"}], modalities=[]
    )
    assert answer(reply) == answer(generate(url, text=prompt, image_data=PICTURE))


def test_a_session_with_pictures_is_answered_or_refused(url, backbone, placeholder):
    status, session = post(url, "/open_session", {"capacity_of_str_len": 1000})
    assert status == 200
    turn = {"session_params": {"id": json.loads(session)}}
    first = generate(url, text=f"{placeholder} what?", image_data=PICTURE, **turn)
    if backbone == "llava_next":
        assert_refused(first, "pictures do not work in a session")
        first = generate(url, text="what?", **turn)
    turn["session_params"] |= {"rid": json.loads(first[1])["meta_info"]["id"], "offset": -1}
    assert generate(url, text=" and?", **turn)[0] == 200
    assert post(url, "/close_session", {"session_id": json.loads(session)})[0] == 200


def test_twenty_pictures_are_answered_cold_as_warm(url):
    pictures = [image(data_url(flat_picture(number, (112, 112)))) for number in range(20)]
    flush(url)
    cold = logprobs(chat(url, *pictures, "what?"))
    # Keys of pictures of so few tokens lose next to nothing; Values are whole here.
    assert logprobs(chat(url, *pictures, "what?")) == pytest.approx(cold, abs=1e-2)


def test_token_ids_with_one_placeholder_or_expanded_are_the_same_prompt(url, backbone, placeholder):
    ids, token_id = tokens(url, f"{placeholder} what?"), tokens(url, PLACEHOLDER[backbone][1])[0]
    reply = generate(url, input_ids=ids, image_data=PICTURE)
    assert answer(reply) == answer(generate(url, text=f"{placeholder} what?", image_data=PICTURE))
    at, made = (
        ids.index(token_id),
        json.loads(reply[1])["meta_info"]["prompt_tokens"] - len(ids) + 1,
    )
    expanded = ids[:at] + [token_id] * made + ids[at + 1 :]
    wrong = ids[:at] + [token_id] * 50 + ids[at + 1 :]
    if backbone == "qwen2_5_vl":
        assert answer(generate(url, input_ids=expanded, image_data=PICTURE)) == answer(reply)
        assert_refused(
            generate(url, input_ids=wrong, image_data=PICTURE),
            f"picture 1 makes {made} tokens.* has 50",
        )
    else:  # the host's processor expands them in the scheduler
        assert_refused(generate(url, input_ids=expanded, image_data=PICTURE), "placeholder")
        assert_refused(generate(url, input_ids=wrong, image_data=PICTURE), "placeholder")
    assert_refused(generate(url, input_ids=tokens(url, "what?"), image_data=PICTURE), "placeholder")


@pytest.mark.parametrize("token_id", [-6, 10**6 + 77, 10**12])
def test_a_token_id_that_the_model_lacks_is_refused(url, token_id):
    assert_refused(generate(url, input_ids=[5, token_id, 7]), f"input_ids holds {token_id}")


def test_blank_pictures_of_other_shape_are_two_for_the_cache(url):
    wide, tall = (data_url(Image.new("RGB", size, "white")) for size in ((672, 336), (336, 672)))
    flush(url)
    cold = logprobs(chat(url, image(tall), "Describe it."))
    flush(url)
    chat(url, image(wide), "Describe it.")
    assert logprobs(chat(url, image(tall), "Describe it.")) == pytest.approx(cold, abs=1e-3)


def encoded(image_format: str) -> bytes:
    buffer = io.BytesIO()
    picture(1, SIZE).save(buffer, image_format)
    return buffer.getvalue()


def as_url(raw: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def decompression_bomb() -> bytes:
    """A PNG of 100 bytes that says it is of 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


BAD_PICTURES = {
    "half a PNG": lambda: as_url(encoded("PNG")[:2000]),
    "half a JPEG": lambda: as_url(encoded("JPEG")[:2000]),
    "a text": lambda: as_url(b"hello world"),
    "nothing": lambda: as_url(b""),
    "no base64": lambda: "data:image/png;base64,@@@@!!",
    "no such file": lambda: "/nowhere/picture.png",
    "no such file by address": lambda: "file:///nowhere/picture.png",
    "a folder": lambda: "/tmp",
    "no answer": lambda: "http://127.0.0.1:9/picture.png",
    "unknown scheme": lambda: "ftp://127.0.0.1/picture.png",
    "a bomb": lambda: as_url(decompression_bomb()),
}


@pytest.mark.parametrize("make", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_a_picture_that_cannot_be_loaded_is_refused(url, placeholder, make):
    reason = "(?i)image|base64|No such file|directory|Max retries"
    assert_refused(chat(url, image(make()), "what?"), reason)
    assert_refused(chat(url, image(make()), "what?", stream=True), reason)
    assert_refused(chat(url, image(PICTURE), image(make()), "what?"), reason)
    assert_refused(generate(url, text=f"{placeholder} what?", image_data=make()), reason)
    assert_refused(
        generate(url, text=f"{placeholder}{placeholder} what?", image_data=[PICTURE, make()]),
        reason,
    )


def test_media_that_the_model_does_not_take_are_refused(url, placeholder):
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    audio = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}
    for part in (video, audio):
        assert_refused(chat(url, image(PICTURE), part, "what?"), "(?i)video|audio")
        assert_refused(chat(url, part, "what?"), "(?i)video|audio|Invalid image data")
    for field in ("video_data", "audio_data"):
        prompt = {"text": f"{placeholder} what?", "image_data": PICTURE, field: "data:;base64,AAAA"}
        assert_refused(generate(url, **prompt), "(?i)video|audio")


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollama_clients_may_send_pictures(url, path):
    def body(picture_base64: str, **fields) -> dict:
        message = {"role": "user", "content": "what?", "images": [picture_base64]}
        asked = (
            {"messages": [message]}
            if path == "/api/chat"
            else {"prompt": "what?", "images": [picture_base64]}
        )
        return (
            {"model": "m", "options": {"num_predict": 6, "temperature": 0}, "stream": False}
            | asked
            | fields
        )

    raw = PICTURE.split(",")[1]
    flush(url)
    status, text = post(url, path, body(raw))
    assert status == 200, text
    reply = json.loads(text)
    said = reply["message"]["content"] if path == "/api/chat" else reply["response"]
    flush(url)
    assert said == answer(chat(url, image(PICTURE), "what?", ignore_eos=False))
    status, text = post(url, path, body(raw, stream=True))
    assert status == 200 and json.loads(text.splitlines()[-1])["done"]
    for stream in (False, True):
        assert_refused(post(url, path, body("xx", stream=stream)), "error.*(image|base64)")
        assert_refused(
            post(url, path, body(raw, options={"temperature": -1}, stream=stream)),
            "temperature must be",
        )


def test_grammars_constrain_the_answer(url):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    fields = {"response_format": form, "max_tokens": 40, "ignore_eos": False, "logprobs": False}
    assert answer(chat(url, image(PICTURE), "what?", **fields)).lstrip().startswith("{")
    assert re.fullmatch("[0-9]+", answer(generate(url, {"regex": "[0-9]+"}, text="what?")))
    assert answer(generate(url, {"ebnf": 'root ::= "yes" | "no"'}, text="what?")) in ("yes", "no")
    assert_refused(generate(url, {"regex": "[0-9"}, text="what?"), "regex")


def test_beam_search_is_refused(url, placeholder):
    for prompt in ({"text": "what?"}, {"text": f"{placeholder} what?", "image_data": PICTURE}):
        assert_refused(
            generate(url, {"beam_width": 2}, **prompt),
            "beam_width 2 does not work with --enable-rotatek",
        )


def test_log_probabilities_may_start_inside_a_cached_image(url, placeholder):
    prompt = {"text": f"{placeholder} what is it?", "image_data": PICTURE}
    length = json.loads(generate(url, **prompt)[1])["meta_info"]["prompt_tokens"]
    for start in (0, 20, length - 2):
        status, text = generate(url, return_logprob=True, logprob_start_len=start, **prompt)
        assert status == 200, text
        assert len(json.loads(text)["meta_info"]["input_token_logprobs"]) == length - start
