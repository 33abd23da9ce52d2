"""Whether a Hugging Face model directory can be loaded at all, found out in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import RotateKError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
INDEX = "model.safetensors.index.json"
FETCH_AGAIN = "copy or download it again (`git lfs pull` in a git clone)"
MOST_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library


def check_checkpoint(path: str | Path, tokenizer_path: str | Path | None = None) -> None:
    """RotateKError, naming the file, for a local model directory that no server could load.

    Reads json and safetensors headers alone. Weights in other formats (*.bin, *.pt) are not looked
    into, nor is a ``tokenizer_path`` that is a directory of its own or a name on the hub.
    """
    directory = Path(path)
    if not directory.is_dir():
        got = "a file" if directory.exists() else "nothing there"
        raise RotateKError(
            f"the model path {directory} must be a directory, got {got}; correct the path."
        )
    config = read_json(directory / "config.json")
    check_weights(directory)
    if tokenizer_path is not None and Path(tokenizer_path) != directory:
        return
    if "vision_config" in config and not any(
        (directory / name).is_file() for name in PROCESSOR_FILES
    ):
        raise RotateKError(
            f"{directory} holds a vision model ({config.get('model_type')}), which takes "
            f"{' or '.join(PROCESSOR_FILES)}, got neither; copy them from where the model came "
            "from."
        )
    if not any((directory / name).is_file() for name in TOKENIZER_FILES) and not any(
        directory.glob("*.tiktoken")
    ):
        raise RotateKError(
            f"{directory} must hold a tokenizer, one of {', '.join(TOKENIZER_FILES)}, got none; "
            "copy it from where the model came from."
        )


def check_weights(directory: Path) -> None:
    if (directory / INDEX).is_file():
        check_index(directory)
        return
    shards = sorted(directory.glob("*.safetensors"))
    for shard in shards:
        tensor_names(shard)
    if not shards and not any(file for kind in ("*.bin", "*.pt") for file in directory.glob(kind)):
        raise RotateKError(
            f"{directory} must hold weights (*.safetensors), got none; {FETCH_AGAIN}."
        )


def check_index(directory: Path) -> None:
    """Every shard that the index names is whole and holds the tensors that the index says."""
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RotateKError(
            f"{directory / INDEX} must map tensors to files in `weight_map`, got none; "
            f"{FETCH_AGAIN}."
        )
    for name in sorted(set(weight_map.values())):
        shard = directory / name
        if not shard.is_file():
            raise RotateKError(f"{shard} is named in {INDEX}, got no such file; {FETCH_AGAIN}.")
        lost = {tensor for tensor, file in weight_map.items() if file == name} - tensor_names(shard)
        if lost:
            raise RotateKError(
                f"{shard} must hold the tensor {min(lost)} by {INDEX}, got a file without it "
                f"({len(lost)} such); index and file are of different checkpoints: take both from "
                "one."
            )


def tensor_names(path: Path) -> set[str]:
    """The tensors of a safetensors file: 8 bytes header length, json header, data up to the end of
    the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > MOST_HEADER_BYTES:
            raise RotateKError(
                f"{path} must be a safetensors file, got {size} bytes that do not begin like one; "
                f"{FETCH_AGAIN}."
            )
        try:
            header = json.loads(file.read(header_bytes)) if 8 + header_bytes <= size else None
            tensors = (
                {}
                if header is None
                else {name: at for name, at in header.items() if name != "__metadata__"}
            )
            data_bytes = max((at["data_offsets"][1] for at in tensors.values()), default=0)
        except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise RotateKError(
                f"{path} must be a safetensors file, got a header that is none ({error}); "
                f"{FETCH_AGAIN}."
            ) from error
    expected = 8 + header_bytes + data_bytes
    if size < expected or size > expected:
        what = "cut short" if size < expected else "with something behind its data"
        raise RotateKError(
            f"{path} must have {expected} bytes by its header, got {size}: {what}; {FETCH_AGAIN}."
        )
    return set(tensors)


def read_json(path: Path) -> dict:
    """The object in the file; RotateKError when there is no file, or no object in it."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RotateKError(
            f"{path} must be there, got no such file; correct the path, or {FETCH_AGAIN}."
        ) from None
    except ValueError as error:
        raise RotateKError(f"{path} must be json, got {error}; {FETCH_AGAIN}.") from error
    if not isinstance(content, dict):
        raise RotateKError(
            f"{path} must hold a json object, got a {type(content).__name__}; {FETCH_AGAIN}."
        )
    return content
