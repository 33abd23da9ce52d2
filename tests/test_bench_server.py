"""The server benchmark without a server: checkpoint directories, what becomes of records, the CSV
and its figure."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections import Counter
from types import SimpleNamespace

import bench_scenarios
import bench_server
import pytest
from bench_multiturn import TurnRecord
from bench_records import (
    append_rows,
    decode_rate,
    is_kept,
    logged_decode_rate,
    plot,
    prefill_counters,
    read_rows,
    round_metrics,
    stock_capacity,
)
from make_full_size_config import make_config
from pictures import data_url, flat_picture
from transformers import AutoConfig, AutoProcessor


def turn(**values) -> TurnRecord:
    return TurnRecord(
        0, 1, **{"prompt_tokens": 100, "completion_tokens": 10, "ttft_s": 0.5} | values
    )


@pytest.mark.parametrize(
    ("model", "size", "visual_tokens", "layers", "kv_heads"),
    [("qwen2.5-vl-7b", (980, 980), 1225, 28, 4), ("llava-next-8b", (672, 672), 2928, 32, 8)],
    ids=["qwen", "llava"],
)
def test_a_full_size_checkpoint_loads_and_counts_image_tokens(
    tmp_path, model, size, visual_tokens, layers, kv_heads
):
    directory = make_config(tmp_path / model, model)
    config, processor = (
        AutoConfig.from_pretrained(directory),
        AutoProcessor.from_pretrained(directory),
    )
    text = config.text_config
    assert (text.num_hidden_layers, text.num_key_value_heads) == (layers, kv_heads)
    assert text.hidden_size // text.num_attention_heads == 128
    assert len(processor.tokenizer) == text.vocab_size
    assert bench_server.IMAGE_SIZES[config.model_type] == size

    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is red?"}]}
    ]
    prompt = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert image_token == json.loads((directory / "config.json").read_text()).get(
        "image_token_id", getattr(config, "image_token_index", None)
    )
    ids = processor(text=[prompt], images=[flat_picture(0, size)], return_tensors="pt").input_ids
    assert (ids == image_token).sum() == visual_tokens


def test_an_answer_of_any_tokens_is_the_same_tokens_in_the_next_turn(tmp_path):
    tokenizer = AutoProcessor.from_pretrained(
        make_config(tmp_path / "llava-next-8b", "llava-next-8b")
    ).tokenizer
    ids = [128319, 5000, 77777, 77777, 1500]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_pictures_differ_and_are_small():
    urls = {data_url(flat_picture(f"decode {i}", (672, 672)), compress_level=1) for i in range(20)}
    assert len(urls) == 20
    assert max(map(len, urls)) < 40_000


def test_the_decode_rate_counts_only_while_all_streams_decode():
    early = turn(start_s=100.0, token_times=[(1.0, 1), (5.0, 41)])  # 10 tokens/s from 101 to 105
    # 8 tokens/s from 103 to 106.
    late = turn(start_s=102.0, token_times=[(1.0, 1), (2.0, 9), (4.0, 25)])
    rate, window = decode_rate([early, late])
    assert rate == pytest.approx(18.0)
    assert window == pytest.approx(2.0)


def test_no_decode_rate_when_streams_do_not_overlap_or_fail():
    first = turn(start_s=0.0, token_times=[(1.0, 1), (2.0, 9)])
    assert decode_rate([first, turn(start_s=5.0, token_times=[(1.0, 1), (2.0, 9)])]) == (None, 0.0)
    assert decode_rate([first, turn(error="gone", token_times=[])]) == (None, 0.0)


def test_the_servers_own_decode_rate_is_a_median_of_full_batches():
    line = (
        "[t] Decode batch, #running-req: {}, #token: 9, gen throughput (token/s): {:.2f}, "
        "#queue-req: 0"
    )
    log = "\n".join(
        line.format(*pair) for pair in [(7, 70), (8, 10), (8, 80), (8, 84), (8, 82), (3, 30)]
    )
    assert logged_decode_rate(log, 8) == 82
    assert logged_decode_rate(log, 3) is None


def test_prefill_counters_are_those_of_the_prefill_stage():
    name = "sglang:per_stage_req_latency_seconds"
    text = "".join(
        f'{name}_{kind}{{model_name="m",stage="{stage}",tp_rank="0"}} {value}\n'
        for stage, kind, value in [
            ("request_process", "sum", 9.0),
            ("prefill_forward", "sum", 1.5),
            ("prefill_forward", "count", 3.0),
        ]
    )
    assert prefill_counters(text) == (1.5, 3.0)


def test_round_metrics_leave_failed_turns_out():
    records = [turn(ttft_s=t, cached_tokens=c) for t, c in [(0.1, 60), (0.2, None), (0.3, 90)]] + [
        turn(error="no")
    ]
    columns = round_metrics(records, 2.0)
    assert (columns["turns"], columns["errors"], columns["turns_per_s"]) == (4, 1, 1.5)
    assert (columns["output_tokens_per_s"], columns["ttft_p50_s"], columns["cached_tokens"]) == (
        15.0,
        0.2,
        60,
    )
    assert columns["ttft_p90_s"] == pytest.approx(0.28)


def test_a_chat_is_kept_when_its_whole_last_prompt_was_cached():
    before = turn(prompt_tokens=100)
    assert is_kept(turn(cached_tokens=100), before)
    assert not is_kept(turn(cached_tokens=99), before)
    assert not is_kept(turn(cached_tokens=None), before)
    assert not is_kept(turn(cached_tokens=100, error="no"), before)
    assert not is_kept(turn(cached_tokens=100), turn(prompt_tokens=None, error="no"))
    assert stock_capacity(1000, before) == 9 and stock_capacity(1000, before, pruned=1000) == 1


def row(server: str, scenario: str, **columns) -> dict:
    names = {
        "model": "m",
        "server": server,
        "scenario": scenario,
        "chats": 8,
        "concurrency": 8,
        "turn": "1",
    }
    return names | columns


def test_csv_appends_and_the_last_measurement_counts(tmp_path):
    path = tmp_path / "results" / "server.csv"
    append_rows(path, ["machine", "two\nlines"], [])
    append_rows(path, ["pools"], [row("stock", "ttft", ttft_p50_s=0.25)])
    append_rows(
        path, [], [row("stock", "ttft", ttft_p50_s=1 / 8), row("rotatek", "ttft", prefill_s=None)]
    )
    lines = path.read_text().splitlines()
    assert lines[:4] == ["# machine", "# two", "# lines", "# pools"]
    assert sum(line.startswith("model,server,") for line in lines) == 1
    rows = read_rows(path)
    assert [(r["server"], r["ttft_p50_s"]) for r in rows] == [("stock", 0.125), ("rotatek", None)]


def test_the_figure_is_drawn_from_rows_with_gaps(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row("stock", "decode", turn="2", decode_tokens_per_s=900.0),
        row("rotatek", "decode", turn="2", decode_tokens_per_s=None),
        row("stock", "ttft", ttft_p50_s=0.3),
        row("rotatek", "ttft", turn="2+", ttft_p50_s=0.2),
        row("stock", "capacity", turn="kept", kept_chats=17),
        row("rotatek", "capacity", turn="2", turns_per_s=3.0),
        row("rotatek", "population", turn="zipf", turns_per_s=3.0),
        row("rotatek", "population", turn="zipf", chats=16, turns_per_s=2.0),
    ]
    append_rows(tmp_path / "server.csv", [], rows)
    drawn = plot(read_rows(tmp_path / "server.csv"), tmp_path / "server.png")
    assert [file.name for file in drawn] == ["server.png", "server-population.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in drawn)
    assert plot(read_rows(tmp_path / "server.csv")[:1], tmp_path / "bars.png") == [
        tmp_path / "bars.png"
    ]


def test_a_plugin_that_is_not_installed_gets_a_distribution(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_server, "entry_points", lambda group: [])
    assert bench_server.plugin_path(tmp_path) == [str(tmp_path), str(bench_server.ROOT)]
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.metadata["Name"] == "sglang-rotatek"
    assert [(e.group, e.name, e.value) for e in found.entry_points] == [
        ("sglang.srt.plugins", "rotatek", "sglang_rotatek.plugin:register")
    ]
    monkeypatch.setattr(
        bench_server, "entry_points", lambda group: [SimpleNamespace(name="rotatek")]
    )
    assert bench_server.plugin_path(tmp_path) == [str(bench_server.ROOT)]


def test_servers_differ_in_their_own_flags_alone(monkeypatch):
    command = [
        "bench_server.py",
        "MODEL",
        "--max-total-tokens",
        "1000",
        "--chats",
        "4",
        "--rotatek-flags=--x 1",
    ]
    monkeypatch.setattr(sys, "argv", command)
    arguments = bench_server.parse_arguments()
    config = {"architectures": ["LlavaNextForConditionalGeneration"]}
    flags = {
        name: bench_server.server_flags(arguments, name, config) for name in bench_server.SERVERS
    }
    stock = flags["stock"]
    assert flags["stock-flashinfer"] == [*stock, "--attention-backend", "flashinfer"]
    assert flags["rotatek"] == [*stock, "--enable-rotatek", "--x", "1"]
    assert flags["rotatek-paper"] == [
        *stock,
        "--enable-rotatek",
        "--rotatek-key-bits",
        "16",
        "--x",
        "1",
    ]
    of_equal_bytes = ["2000" if flag == "1000" else flag for flag in stock]
    assert flags["stock-fp8"] == [*of_equal_bytes, "--kv-cache-dtype", "fp8_e4m3"]
    assert stock[-1] == "--native-llava-next"
    assert "--enable-rotatek" not in stock


@pytest.mark.parametrize("count, concurrency", [(1, 8), (24, 8), (25, 8)])
def test_a_population_returns_in_blocks_of_different_chats(count, concurrency):
    in_order = list(bench_scenarios.return_blocks(count, concurrency, "order"))
    assert [number for block in in_order for number in block] == list(range(count))
    zipf = list(bench_scenarios.return_blocks(count, concurrency, "zipf"))
    assert [len(block) for block in zipf] == [len(block) for block in in_order]
    assert all(len(set(block)) == len(block) and set(block) <= set(range(count)) for block in zipf)
    assert zipf == list(bench_scenarios.return_blocks(count, concurrency, "zipf"))


def test_few_chats_of_a_zipf_population_return_most_often():
    returns = Counter(
        number for block in bench_scenarios.return_blocks(400, 8, "zipf") for number in block
    )
    often = sum(n for _, n in returns.most_common(40))
    assert 0.4 < often / 400 < 0.85 and len(returns) < 250


def test_chats_that_come_from_the_host_were_not_asked_since_turn_1():
    count = sum(bench_scenarios.TIER_CHATS.values()) + max(bench_scenarios.TIER_CHATS.values())
    rounds = bench_scenarios.tier_rounds(list(range(count)))
    by_place = {place: set() for place, *_ in rounds}
    for place, concurrency, chats in rounds:
        assert len(chats) == bench_scenarios.TIER_CHATS[concurrency]
        assert place != "host" or not by_place["host"] & set(chats)
        by_place[place] |= set(chats)
    assert by_place["computed"] == by_place["host"] and not by_place["host"] & by_place["device"]
    assert [place for place, *_ in rounds[-2:]] == ["computed"] * 2  # the cache is emptied before
