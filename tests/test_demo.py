"""The picture of memory that the demo ends with."""

from __future__ import annotations

import demo
import pytest
from demo import BLOCKS, Memory, blocks_of, memory_bars


def state(text: int, image: int, free: int) -> dict:
    return {
        "text_slots_used": text,
        "visual_slots_used": image,
        "slabs_total": 100,
        "slabs_free": free,
        "kv_pool_bytes": 100 * 4096,
        "stock_tokens": 800,
    }


def test_memory_is_what_a_chat_added_in_whole_slabs():
    found = Memory.between("charts", state(10, 50, free=90), state(40, 120, free=83))
    assert found == Memory("charts", 100 * 512, 7 * 4096)


def test_bars_are_as_long_as_what_they_show():
    lines = memory_bars([Memory("a", 4096, 1024), Memory("long", 2048, 1088)], columns=8).split(
        "\n"
    )
    bars = [line[len("long  full width ") :][:8].rstrip() for line in lines[1:]]
    assert bars == ["████████", "██", "████", "██▏"]
    assert lines[1] == "a     full width ████████      4.0 KiB"
    assert lines[4] == "      RotateK    ██▏           1.1 KiB, 1.88 times as many fit"


def test_bars_of_chats_that_hold_nothing_are_empty():
    lines = memory_bars([Memory("a", 0, 0)], columns=8).splitlines()
    assert [line.split()[-2:] for line in lines[1:]] == [["0.0", "KiB"]] * 2
    assert not set("".join(lines)) & set(BLOCKS)


def test_a_narrow_chat_can_take_more_than_at_full_width():
    *_, last = memory_bars([Memory("a", 1024, 2048)], "#", columns=8).splitlines()
    assert "########" in last and last.endswith("0.50 times as many fit")


@pytest.mark.parametrize(
    "encoding, blocks",
    [("utf-8", BLOCKS), ("cp437", "#"), ("ascii", "#"), (None, "#"), ("no such", "#")],
)
def test_bars_are_of_what_a_terminal_can_show(encoding, blocks):
    assert blocks_of(encoding) == blocks
    text = memory_bars([Memory("a", 1024, 300)], blocks_of(encoding))
    assert text.encode("ascii" if blocks == "#" else "utf-8")


def test_the_demo_ends_with_bars_of_every_family(monkeypatch, capsys):
    used = iter(range(0, 1000, 50))

    class Server:
        def __init__(self, *arguments, **options):
            self.url = "http://server"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def rotatek_state(url: str) -> dict:
        tokens = next(used)
        return state(tokens, tokens, free=100 - tokens // 50)

    monkeypatch.setattr(demo, "ServerProcess", Server)
    monkeypatch.setattr(demo, "rotatek_state", rotatek_state)
    monkeypatch.setattr(demo, "hold_chat", lambda url, picture: [demo.Turn(True, 10, 10)] * 3)
    monkeypatch.setattr(demo, "print_memory", lambda state: None)
    monkeypatch.setattr("sys.argv", ["demo.py", "--seed", "1"])
    demo.run_backbone("llava_next", *demo.parse_arguments())
    output = capsys.readouterr().out
    for family in demo.FAMILIES:
        assert f"{family:<9}  full width" in output
    assert output.count("50.0 KiB") == len(demo.FAMILIES)
    assert "ok: 9 of 9 answers right" in output
