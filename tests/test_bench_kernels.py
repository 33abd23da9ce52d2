"""bench_kernels.py without a GPU: arguments, byte counts, slots, checks, CSV and plot."""

from __future__ import annotations

import bench_batches
import bench_kernels
import pytest
import torch
from bench_batches import (
    BF16,
    MODELS,
    Batch,
    Model,
    Request,
    Storage,
    assign_slots,
    compare,
    compress_bytes,
    mixed_requests,
    plan_cases,
    read_bytes,
)
from bench_kernels import OPS, parse_arguments, spread
from kernel_records import COLUMNS, plot, read_csv, summary, with_speedup, write_csv

from sglang_rotatek.kernels import reference

QWEN = MODELS["qwen2.5-vl-7b"]
TINY = Model(num_qo_heads=4, num_kv_heads=2, num_layers=1, context_len=64)
CHAT = Request(images=(24, 17), text=11)
R32, R64, CODED = map(Storage.parse, ("r32", "r64", "k4v4"))
MACHINE = "# A GPU, driver 1; python scripts/bench/bench_kernels.py"


def attention_row(kernel, microseconds, num_bytes, storage="bf16", batch=8, op="decode"):
    cells = {
        "op": op,
        "model": "qwen2.5-vl-7b",
        "batch": batch,
        "visual_tokens": 2880,
        "text_tokens": 256,
    }
    return cells | {
        "kernel": kernel,
        "storage": storage,
        "microseconds": microseconds,
        "bytes": num_bytes,
    }


def case_rows(**cells):
    return with_speedup(
        [
            attention_row("fa3", 30.0, 3000, **cells),
            attention_row("flashinfer", 40.0, 3000, **cells),
            attention_row("rotatek", 20.0, 1500, storage="r32", **cells),
        ]
    )


def test_by_default_everything_is_measured():
    options = parse_arguments([])
    assert options.only == list(OPS)
    assert options.models == list(MODELS)
    assert list(map(str, options.storages)) == ["k4v4", "k4v4-fp8", "k2v4", "r32"]
    assert not options.plot and not options.quick


def test_lists_are_separated_by_commas():
    options = parse_arguments(
        ["--only", "decode,plan", "--models", "llava-next-8b", "--storages", "r16"]
    )
    assert (options.only, options.models, options.storages) == (
        ["decode", "plan"],
        ["llava-next-8b"],
        [Storage.parse("r16")],
    )


UNKNOWN = (
    *(("--only", "decod"), ("--models", "gpt"), ("--without", "vllm")),
    *(("--storages", "r33"), ("--storages", "x"), ("--storages", "fp8")),
)


@pytest.mark.parametrize("argv", map(list, UNKNOWN), ids=str)
def test_unknown_names_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(argv)
    assert argv[1] in capsys.readouterr().err


def test_bytes_at_full_width_are_keys_and_values_of_every_token():
    assert read_bytes(QWEN, [Request((2880,), 256)] * 8) == 8 * (2880 + 256) * 4 * (128 + 128) * 2


def test_bytes_of_rotated_keys_count_z_values_and_each_basis_once():
    visual, basis = 2880 * 4 * (32 + 128) * 2, 4 * 128 * (32 * 2 + 4)
    assert read_bytes(QWEN, [Request((2880,), 0)], R32) == visual + basis
    assert read_bytes(QWEN, [Request((1440, 1440), 0)], R32) == visual + 2 * basis
    assert read_bytes(QWEN, [Request((), 100)], R32) == read_bytes(QWEN, [Request((), 100)])


def test_bytes_of_coded_rows_and_fp8():
    requests = [Request((2880,), 100)]
    coded, basis = 2880 * 4 * 152, 4 * 128 * (16 * 2 + 4)
    assert read_bytes(QWEN, requests, CODED) == coded + basis + 100 * 4 * 512
    assert (
        read_bytes(QWEN, requests, Storage.parse("k2v4-fp8"))
        == 2880 * 4 * 120 + basis + 100 * 4 * 256
    )
    assert read_bytes(QWEN, requests, Storage.parse("fp8")) == 2980 * 4 * 256
    assert compress_bytes(QWEN, 1, 2880, CODED) == 2880 * 4 * (256 + 16 + 64 + 4) + basis


@pytest.mark.parametrize("name", ["bf16", "fp8", "r32", "r64-fp8", "k4v4", "k2v4-fp8", "k4v8"])
def test_storages_keep_their_names(name):
    assert str(Storage.parse(name)) == name


def test_coded_pools_are_what_a_server_has(on_cpu):
    batch = Batch(TINY, [CHAT], sets=2)
    pools = batch.pools(Storage.parse("k4v4-fp8"))[1]
    assert (pools.key_bits, pools.value_bits, pools.k_text.dtype) == (4, 4, torch.float8_e4m3fn)
    keys, values = reference.expand(batch.kv_indices, pools)
    assert 1 < keys.std() < 4 and 0.5 < values.std() < 4


def test_bytes_of_a_chunk_are_added_at_full_width():
    request = Request((576,), 16)
    assert (
        read_bytes(QWEN, [request] * 2, R32, 10) - read_bytes(QWEN, [request] * 2, R32)
        == 20 * 4 * 256 * 2
    )


def test_bytes_of_compress_are_read_wide_and_written_narrow():
    assert compress_bytes(QWEN, 2, 576, R64) == 2 * 576 * 4 * (128 + 64) * 2 + 2 * 4 * 128 * (
        64 * 2 + 4
    )


def test_slots_are_not_shared_and_lie_in_their_pools():
    requests = [CHAT, Request((), 7), Request((9,), 0)]
    slots = assign_slots(requests, new_tokens=3)
    everything = torch.cat(slots.rows)
    assert [len(row) for row in slots.rows] == [24 + 17 + 11 + 3, 7 + 3, 9 + 3]
    assert len(everything.unique()) == len(everything)
    assert everything.min() >= 1
    is_visual = everything > slots.text_slots
    assert is_visual.sum() == 24 + 17 + 9
    assert everything.max() < 1 + slots.text_slots + len(slots.slot_to_basis)


def test_slots_of_an_image_are_consecutive_and_share_a_basis():
    slots = assign_slots([CHAT])
    row = slots.rows[0]
    for basis, start, tokens in ((0, 3, 24), (1, 3 + 24 + 3, 17)):
        image = row[start : start + tokens]
        assert (image.diff() == 1).all()
        assert (slots.slot_to_basis[image - 1 - slots.text_slots] == basis).all()


def test_the_mixed_batch_has_chats_without_with_one_and_with_several_images():
    requests = mixed_requests()
    assert len(requests) == 64
    assert {min(len(request.images), 2) for request in requests} == {0, 1, 2}
    assert max(sum(request.images) + request.text for request in requests) < min(
        model.context_len for model in MODELS.values()
    )


@pytest.mark.parametrize("quick", [True, False])
def test_plans_are_measured_at_8_requests_of_32k_and_128k_tokens_in_images_and_in_text(quick):
    cases = plan_cases(quick)
    long = [
        (len(c), sum(c[0].images) + c[0].text, bool(c[0].images)) for c in cases if len({*c}) == 1
    ]
    assert long[-4:] == [(8, 32768, True), (8, 32768, False), (8, 131072, True), (8, 131072, False)]
    assert mixed_requests() in cases


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(bench_batches, "DEVICE", "cpu")
    torch.manual_seed(0)


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_the_full_width_check_is_torch_attention(on_cpu, new_tokens):
    batch = Batch(TINY, [CHAT, Request((), 9)], sets=2, new_tokens=new_tokens)
    out = torch.empty_like(batch.q[1])
    for i, row in enumerate(batch.slots.rows):
        rows = slice(int(batch.qo_indptr[i]), int(batch.qo_indptr[i + 1]))
        q, k, v = (
            x.float().transpose(0, 1) for x in (batch.q[1, rows], batch.k[1, row], batch.v[1, row])
        )
        mask = torch.ones(q.shape[1], len(row), dtype=torch.bool).tril(len(row) - q.shape[1])
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        out[rows] = attended.transpose(0, 1).to(out.dtype)
    batch.check("torch", batch.pools(BF16), 1, out)
    out[-1, 0] *= 1.1
    with pytest.raises(ValueError, match="torch, layer 1, request 1 of 2"):
        batch.check("torch", batch.pools(BF16), 1, out)


def test_rotated_pools_hold_the_text_and_values_that_the_peers_read(on_cpu):
    batch = Batch(TINY, [CHAT], sets=1)
    pools = batch.pools(R32)[0]
    assert pools.z.shape == (len(batch.slots.slot_to_basis), 2, 32)
    assert pools.query_map.shape == (2, 2, 128, 32)
    assert torch.equal(torch.cat([pools.v_text, pools.v_visual]), batch.v[0])
    assert torch.equal(pools.k_text, batch.k[0, : 1 + batch.slots.text_slots])


def test_a_nan_is_a_mismatch():
    with pytest.raises(ValueError, match="relative error nan"):
        compare("x", torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))


class FakeKernel:
    storage = BF16
    missing = (ImportError,)

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def decode(self, batch):
        if self.error:
            raise self.error
        return lambda i: batch.q[i]


def test_a_kernel_that_is_not_installed_is_named_and_left_out(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    bench = bench_kernels.Bench(parse_arguments([]), add_rows=None)
    present, absent = FakeKernel("present"), FakeKernel("absent", ImportError("no module absent"))
    assert bench.usable("decode", [present, absent]) == [present]
    assert (
        "decode: absent bf16 is left out: ImportError: no module absent" in capsys.readouterr().out
    )
    with pytest.raises(TypeError):
        bench.usable("decode", [FakeKernel("broken", TypeError("wrong arguments"))])


def test_times_are_summed_up_by_median_and_quintiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


def test_speedup_is_over_the_fastest_peer():
    rows = case_rows()
    assert [row.get("speedup_over_fastest_peer") for row in rows] == [None, None, 1.5]
    rows = with_speedup([attention_row("fa3", 18.0, 1500, storage="fp8"), *rows])
    assert rows[-1]["speedup_over_fa3"] == 1.5
    assert rows[-1]["speedup_over_fa3_fp8"] == rows[-1]["speedup_over_fastest_peer"] == 0.9


def test_without_peers_there_is_no_speedup():
    assert (
        "speedup_over_fastest_peer"
        not in with_speedup([attention_row("rotatek", 20.0, 1500, storage="r32")])[0]
    )


def test_csv_names_the_machine_and_leaves_missing_cells_empty(tmp_path):
    path = tmp_path / "results" / "kernels.csv"
    write_csv(path, MACHINE, case_rows())
    machine, rows = read_csv(path)
    assert machine == MACHINE
    assert tuple(rows[0]) == COLUMNS
    assert [row["kernel"] for row in rows] == ["fa3", "flashinfer", "rotatek"]
    assert [row["storage"] for row in rows] == ["bf16", "bf16", "r32"]
    assert [row["speedup_over_fastest_peer"] for row in rows] == ["", "", "1.5"]
    assert rows[0]["microseconds"] == "30"


def test_plot_is_drawn_from_the_csv_alone(tmp_path, monkeypatch):
    rows = [row for batch in (1, 8) for row in case_rows(batch=batch)]
    write_csv(tmp_path / "kernels.csv", MACHINE, rows)
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--plot", "--output", str(tmp_path)])
    bench_kernels.main()
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_a_comparison_is_refused(tmp_path):
    write_csv(tmp_path / "kernels.csv", MACHINE, [attention_row("fa3", 30.0, 3000)])
    with pytest.raises(SystemExit, match="no decode row of RotateK"):
        plot(tmp_path / "kernels.csv", tmp_path / "kernels.png")


def test_summary_has_one_line_a_context_and_kernel():
    rows = [row for batch in (1, 8) for row in case_rows(batch=batch)]
    lines = summary(rows)
    assert [line.split()[3:5] for line in lines] == [
        ["fa3", "bf16"],
        ["flashinfer", "bf16"],
        ["rotatek", "r32"],
    ]
    assert "2880+256+0" in lines[-1]
    assert lines[-1].endswith("1: 20.0 us 1.50x | 8: 20.0 us 1.50x")
