"""Documents: links resolve, lines are short, and the table of hooks is whole."""

import re
import subprocess
from pathlib import Path

import pytest

from sglang_rotatek import plugin

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(
    ["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split("\0")
DOCUMENTS = [name for name in TRACKED if name and (ROOT / name).exists()]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHORT = ["sglang_rotatek/README.md", "kernels/README.md", "patches/README.md"]
MOST_LINES, MOST_COLUMNS = 100, 100


def prose(path: Path) -> str:
    """Without blocks of code, which hold no links and no headings."""
    return re.sub(r"^(```[\s\S]*?^```|(?: {4}.*\n)+)", "", path.read_text(), flags=re.M)


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name):
    assert broken_links(ROOT / name) == []


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path):
    document = tmp_path / "a.md"
    document.write_text(
        "# One two\n\n    [e](code.md)\n\n[a](a.md#one-two) [b](b.md) [c](#one) [d](https://x.org/b.md)\n"
    )
    assert broken_links(document) == ["b.md", "#one"]


@pytest.mark.parametrize("name", SHORT)
def test_a_folders_document_is_short(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= MOST_LINES
    long = [line for line in lines if len(line) > MOST_COLUMNS]
    assert [line for line in long if not line.startswith("|") and "](" not in line] == []


def test_the_document_of_hooks_has_a_row_for_each():
    text = (ROOT / "patches" / "README.md").read_text()
    rows = re.findall(r"^\| `\S*?(\w+)` \| ([A-Z]+), `(\w+)` \|", text, flags=re.M)
    hooks = [
        (hook.target.rpartition(".")[2], hook.kind, hook.function.__module__.rpartition(".")[2])
        for hook in plugin.hook_table()
    ]
    assert sorted(rows) == sorted(hooks)
