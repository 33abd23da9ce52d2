import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from sglang_rotatek.config import RotateKError
from sglang_rotatek.models.checkpoint import INDEX, check_checkpoint

SHIPPED = sorted((ROOT / "scripts" / "models").glob("reader-*"))
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MIB = 2**20


def write_safetensors(path, names, floats=4):
    header = {"__metadata__": {"format": "pt"}}
    for at, name in enumerate(names):
        offsets = [4 * floats * at, 4 * floats * (at + 1)]
        header[name] = {"dtype": "F32", "shape": [floats], "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(4 * floats * len(names)))


@pytest.fixture
def checkpoint(tmp_path):
    """The small files of a shipped model, with two tiny shards."""
    for file in SHIPPED[-1].iterdir():
        if file.suffix in (".json", ".jinja") and file.name != INDEX:
            shutil.copy(file, tmp_path)
    write_safetensors(tmp_path / SHARDS[0], ["a", "b"])
    write_safetensors(tmp_path / SHARDS[1], ["c"])
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}})
    )
    return tmp_path


def refusal(path):
    with pytest.raises(RotateKError) as error:
        check_checkpoint(path)
    message = str(error.value)
    assert ", got " in message
    assert ";" in message.split(", got ", 1)[1], "no remedy"
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_model_passes_and_is_small(path):
    check_checkpoint(path)
    assert max(file.stat().st_size for file in path.glob("*.safetensors")) < 8 * MIB
    assert sum(file.stat().st_size for file in path.iterdir()) < 32 * MIB


def test_both_backbones_are_shipped():
    assert [path.name for path in SHIPPED] == ["reader-llava-next", "reader-qwen2.5-vl"]


def test_a_whole_checkpoint_passes(checkpoint):
    check_checkpoint(checkpoint)
    check_checkpoint(str(checkpoint))


def test_tiny_models_of_one_file_pass(models):
    for path in models.values():
        check_checkpoint(path)


def test_weights_without_an_index_are_checked_too(checkpoint):
    (checkpoint / INDEX).unlink()
    check_checkpoint(checkpoint)
    (checkpoint / SHARDS[1]).write_bytes(b"nothing of the kind")
    assert SHARDS[1] in refusal(checkpoint)


def test_weights_in_other_formats_are_left_alone(checkpoint):
    (checkpoint / INDEX).unlink()
    for shard in SHARDS:
        (checkpoint / shard).unlink()
    assert "weights" in refusal(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    check_checkpoint(checkpoint)


def test_a_missing_directory_is_refused(tmp_path):
    message = refusal(tmp_path / "no-such-model")
    assert "no-such-model must be a directory, got nothing there" in message
    (tmp_path / "model.zip").write_bytes(b"")
    assert "model.zip must be a directory, got a file" in refusal(tmp_path / "model.zip")


def test_a_missing_config_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    assert "config.json must be there" in refusal(checkpoint)


@pytest.mark.parametrize(
    "text", ["{", "", "[1]", "\udcff"], ids=["cut short", "empty", "a list", "not text"]
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none_is_refused(checkpoint, name, text):
    (checkpoint / name).write_bytes(text.encode(errors="surrogateescape"))
    assert f"{checkpoint / name} must" in refusal(checkpoint)


def test_a_vision_model_without_processor_files_is_refused(checkpoint):
    for file in checkpoint.glob("p*processor_config.json"):
        file.unlink()
    message = refusal(checkpoint)
    assert "preprocessor_config.json or processor_config.json, got neither" in message
    (checkpoint / "processor_config.json").write_text("{}")
    check_checkpoint(checkpoint)


def test_a_text_model_needs_no_processor_files(checkpoint):
    for file in checkpoint.glob("p*processor_config.json"):
        file.unlink()
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    check_checkpoint(checkpoint)


def test_a_missing_tokenizer_is_refused(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    assert "must hold a tokenizer" in refusal(checkpoint)


@pytest.mark.parametrize("weight_map", [None, {}, []], ids=["absent", "empty", "a list"])
def test_an_index_that_maps_nothing_is_refused(checkpoint, weight_map):
    (checkpoint / INDEX).write_text(
        json.dumps({} if weight_map is None else {"weight_map": weight_map})
    )
    assert "weight_map" in refusal(checkpoint)


def test_a_shard_that_is_not_there_is_refused(checkpoint):
    (checkpoint / SHARDS[1]).unlink()
    assert f"{SHARDS[1]} is named in {INDEX}, got no such file" in refusal(checkpoint)


@pytest.mark.parametrize("left", [0, 7, 8, 60, -1], ids=lambda left: f"{left} bytes")
def test_a_shard_that_was_cut_short_is_refused(checkpoint, left):
    shard = checkpoint / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:left])
    message = refusal(checkpoint)
    assert str(shard) in message
    assert f"got {shard.stat().st_size}" in message


def test_a_shard_with_something_behind_its_data_is_refused(checkpoint):
    with (checkpoint / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    assert "something behind its data" in refusal(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        (4).to_bytes(8, "little") + b"nope",
        (2).to_bytes(8, "little") + b"[]",
        (7).to_bytes(8, "little") + b'{"a":1}',
        (24).to_bytes(8, "little") + b'{"a":{"data_offsets":1}}',
    ],
    ids=["git-lfs pointer", "no json", "no object", "no entry", "no offsets"],
)
def test_a_shard_of_another_kind_is_refused(checkpoint, content):
    (checkpoint / SHARDS[0]).write_bytes(content)
    assert f"{checkpoint / SHARDS[0]} must be a safetensors file" in refusal(checkpoint)


def test_a_tensor_that_is_not_in_its_shard_is_refused(checkpoint):
    write_safetensors(checkpoint / SHARDS[0], ["a"])
    assert f"{SHARDS[0]} must hold the tensor b by {INDEX}" in refusal(checkpoint)


def test_the_check_imports_no_torch():
    code = "import sys, sglang_rotatek.models.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
