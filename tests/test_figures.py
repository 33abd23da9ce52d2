"""The figures of scripts/results: their files are there and have what the figures name."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("matplotlib")

import plot
from bench_records import rows_with_populations
from figures import answers, attention, pruned, serving, style
from kernel_records import read_csv


@pytest.mark.parametrize("name", plot.FIGURES)
def test_every_figure_is_drawn_from_the_files_it_names(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plot.py", name, "--output", str(tmp_path)])
    plot.main()
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert int.from_bytes(data[16:20], "big") == style.WIDTH * style.DPI, "pixels across"


def test_every_figure_of_the_results_is_among_them():
    assert {file.name for file in plot.RESULTS.glob("*.png")} == set(plot.FIGURES)


def test_an_unknown_figure_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plot.py", "no.png"])
    with pytest.raises(SystemExit):
        plot.main()
    assert "no figure 'no.png'; there are fidelity.png" in capsys.readouterr().err


def test_results_have_the_arms_that_figures_name():
    for file in plot.FIGURES["fidelity.png"].files:
        assert set(answers.NAMED) <= set(json.loads((plot.RESULTS / file).read_text())["arms"])
    for file in plot.FIGURES["pruning.png"].files:
        document = json.loads((plot.RESULTS / file).read_text())
        arms = [[arm] for arm, _, _ in pruned.TOKENS]
        arms += [[f"{form} divprune", f"{form} all"] for form, _ in pruned.FORMATS]
        assert all(pruned.points_of(document, each) for each in arms)
    _, rows = read_csv(plot.RESULTS / "kernels.csv")
    decode = [row for row in rows if row["op"] == "decode" and row["kernel"] == "rotatek"]
    assert attention.chosen_contexts(decode) == [("0", "3136"), ("576", "256"), ("2880", "256")]


def test_the_population_is_in_units_of_stocks_capacity_and_later_runs_replace_points():
    rows = rows_with_populations(plot.RESULTS / "server.csv")
    of_population = [row for row in rows if row["scenario"] == "population"]
    assert serving.stock_chats(of_population) == 32
    servers = ("stock", "stock-fp8", "rotatek")
    found = {
        (row["server"], row["turn"]): round(row["turns_per_s"], 1)
        for row in of_population
        if row["chats"] == 128
    }
    zipf, order = ([found[server, turn] for server in servers] for turn in ("zipf", "order"))
    assert zipf == [14.7, 16.6, 18.3] and order == [10.1, 10.0, 10.2], "of the later run"


def test_a_population_without_a_prompts_length_is_counted_in_chats():
    row = {"turn": "order", "kv_stock_tokens": 1000.0, "prompt_tokens": None, "turns_per_s": 3.0}
    assert serving.stock_chats([row]) is None


def test_one_way_to_store_has_one_colour_and_others_have_their_own():
    found = style.storages(["bf16", "k4v4", "new", "newer", "new"])
    assert found["bf16"] is style.STORAGES["stock"] and found["k4v4"] is style.STORAGES["rotatek"]
    assert list(found) == ["bf16", "k4v4", "new", "newer"]
    assert len({storage.colour for storage in found.values()}) == 4


def test_names_at_the_ends_of_lines_keep_a_distance():
    _, axis = answers.pyplot.subplots()
    pruned.name_ends(axis, {"b": (0.6, 98.0, "k"), "a": (0.6, 99.0, "k"), "c": (0.6, 10.0, "k")})
    places = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert places == {"a": 99, "b": 92, "c": 10}


def test_scenarios_that_were_not_run_leave_no_figure(tmp_path):
    assert not serving.draw_bars([], tmp_path / "a.png")
    assert not serving.draw_population([], tmp_path / "b.png")
    assert not list(tmp_path.glob("*.png"))
