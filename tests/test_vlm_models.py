"""The batched forward pass that trained the readers is the one of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROOT
from tasks import make_picture
from transformers import AutoProcessor
from vlm_models import NAMES, READERS, load_weights

MIB = 2**20
TOLERANCE = 1e-3  # of fp32 logits, which reach about 30
SIZES = pytest.mark.parametrize(
    "size", [(672, 672), (1008, 672)], ids=lambda size: f"{size[0]}x{size[1]}"
)


@pytest.fixture(scope="module", params=sorted(READERS))
def trained(request):
    """A reader with its shipped weights, and the library's model and processor, fp32."""
    directory = ROOT / "scripts" / "models" / NAMES[request.param]
    reader = READERS[request.param].build()
    load_weights(reader, directory)
    model = type(reader.model).from_pretrained(directory, dtype=torch.float32)
    return reader, model, AutoProcessor.from_pretrained(directory)


def chat_messages(picture):
    messages = []
    for question in picture.questions:
        image = [] if messages else [{"type": "image"}]
        messages.append(
            {"role": "user", "content": [*image, {"type": "text", "text": question.text}]}
        )
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def library_inputs(trained, picture):
    """Inputs of transformers, and where in its prompt the text after the picture begins."""
    _, model, processor = trained
    text = processor.apply_chat_template(chat_messages(picture), tokenize=False)
    inputs = processor(text=[text], images=[picture.image], return_tensors="pt")
    prompt = inputs["input_ids"][0].tolist()
    return inputs, len(prompt) - prompt[::-1].index(model.config.image_token_id)


def reader_inputs(reader, picture):
    turns = [(question.text, question.answer) for question in picture.questions]
    ids = reader.tokenizer.encode(
        "".join(asked + answered for asked, answered in reader.chat(turns))
    )
    return torch.from_numpy(np.array(picture.image)[None]), torch.tensor([ids])


def largest_difference(trained, picture, inputs, start):
    reader, model, _ = trained
    pixels, ids = reader_inputs(reader, picture)
    with torch.no_grad():
        expected = model(**inputs).logits[:, start : start + ids.shape[1]]
        got, _ = reader.forward(pixels, ids)
    return (got - expected).abs().max().item()


@SIZES
def test_the_prompt_of_training_is_the_one_of_the_chat_template(trained, size):
    reader, model, _ = trained
    picture = make_picture("documents", 3, size, questions=2)
    inputs, start = library_inputs(trained, picture)
    pixels, ids = reader_inputs(reader, picture)
    prompt = inputs["input_ids"][0].tolist()
    assert prompt[: prompt.index(model.config.image_token_id)] == reader.prefix_ids
    assert prompt[start : start + ids.shape[1]] == ids[0].tolist()
    with torch.no_grad():
        visual, squares = reader.visual_tokens(pixels.permute(0, 3, 1, 2).float())
    assert visual.shape[1] == start - len(reader.prefix_ids)
    assert squares.shape[1:3] == (size[1] // 28, size[0] // 28)


@SIZES
def test_the_forward_pass_of_training_is_the_one_of_transformers(trained, size):
    picture = make_picture("documents", 3, size, questions=2)
    inputs, start = library_inputs(trained, picture)
    assert largest_difference(trained, picture, inputs, start) < TOLERANCE


@pytest.mark.parametrize("name", NAMES.values())
def test_a_shipped_model_is_small(name):
    sizes = {file.name: file.stat().st_size for file in (ROOT / "scripts/models" / name).iterdir()}
    assert max(sizes.values()) < 8 * MIB
    assert sum(sizes.values()) < 32 * MIB
