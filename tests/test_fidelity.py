"""fidelity.py: its arms against formulas written down again, its protocols, and trained models."""

from __future__ import annotations

import json

import fidelity
import fidelity_arms
import pytest
import torch
from fidelity_models import Checkpoint, TextModel, Trial
from tasks import FAMILIES, HELD_OUT_SEED, make_picture

HEADS, GROUP, WINDOW = 2, 3, 32


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def keys_of(n: int, head_dim: int) -> torch.Tensor:
    """[n, HEADS, head_dim] with a mean, and energy that falls with the direction."""
    turn = torch.linalg.qr(torch.randn(HEADS, head_dim, head_dim))[0]
    scaled = torch.randn(n, HEADS, head_dim) * 0.95 ** torch.arange(head_dim)
    return torch.einsum("nhd,hde->nhe", scaled, turn) + torch.randn(HEADS, head_dim)


def queries_of(head_dim: int) -> torch.Tensor:
    return torch.randn(WINDOW, HEADS * GROUP, head_dim) * torch.linspace(0.1, 3, head_dim)


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [
        ("full", 512), ("fp8/fp8", 256), ("rank32", 320), ("paper32", 320), ("think32", 320),
        ("spark32", 64 + 16 + 12 + 2 + 256), ("int4/int4", 136), ("int4/int3", 120),
        ("16+h4/int4", 152), ("16+z4/int4", 152), ("16+z4/z4", 152), ("16+h3/int4", 136),
        ("16+z3/z3", 120), ("16+h2/int4", 120), ("16+z2/z2", 88),
    ],
)  # fmt: skip
def test_bytes_of_an_arm(name, bytes_):
    assert fidelity.make_arm(name, 128).bytes == bytes_


@pytest.mark.parametrize("name", [*fidelity.ARMS, "16+z2/z2", "8+z3/z3"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_an_arm_reads_back_something_close(name, head_dim):
    x = torch.randn(70, HEADS, head_dim) + 2
    arm = fidelity.make_arm(name, head_dim)
    queries = queries_of(head_dim)
    for read_back, is_full in (
        (arm.key(x, queries), name == "full"),
        (arm.value(x), "/" not in name),
    ):
        error = (read_back - x).square().mean() / x.square().mean()
        # ThinK drops half of these flat Keys' energy at the least, SparK keeps their signs.
        assert error < (0.8 if "think" in name else 0.25)
        assert (error == 0) == is_full


@pytest.mark.parametrize(
    "name",
    ["rank", "rank0", "think129", "16+h5", "16+z1", "160+h4", "int8", "full/int5", "spark", "h4"],
)
def test_a_name_that_is_no_arm_is_refused(name):
    with pytest.raises(ValueError, match="must be"):
        fidelity.make_arm(name, 128)


def test_an_arm_without_values_keeps_them():
    assert fidelity.make_arm("16+h4/", 128).bytes == fidelity.make_arm("16+h4", 128).bytes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_step_a_token_clips_nothing_and_is_off_by_half_of_it(bits):
    x = keys_of(50, 80)
    read_back = fidelity_arms.per_token(x, bits)
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert ((read_back - x).abs() <= 0.51 * step[..., None] + 0.01).all()
    assert all(len(row.unique()) <= 2**bits for row in read_back.flatten(0, 1))


def test_a_rest_of_z_is_that_of_coded_rows():
    x = keys_of(50, 64)
    again = fidelity_arms.head_and_rest(
        x, 16, lambda rest: fidelity_arms.in_halves(rest, 4, searches=True)
    )
    assert torch.allclose(fidelity.make_arm("16+z4", 64).key(x, None), again, atol=1e-5)


def test_three_bits_are_between_four_and_two():
    x = keys_of(300, 128)
    errors = [
        (fidelity.make_arm(f"16+{kind}{bits}", 128).key(x, None) - x).square().mean()
        for kind in "hz"
        for bits in (4, 3, 2)
    ]
    for of_kind in (errors[:3], errors[3:]):
        assert of_kind[0] < of_kind[1] / 3 < of_kind[2] / 9
    # A step each half of the channels is worth a fifth of the error at the least.
    assert all(halves < 0.8 * whole for whole, halves in zip(errors[:3], errors[3:], strict=True))


def test_a_half_on_one_side_of_zero_and_one_of_zeros_are_read_back():
    x = torch.cat([torch.full((1, 1, 32), 3.0), torch.zeros(1, 1, 32)], -1)
    for sign in (1, -1):
        read_back = fidelity_arms.in_halves(sign * x, 4)
        assert torch.allclose(read_back, sign * x, rtol=0.04, atol=2.0**-13)


def test_think_keeps_the_channels_with_the_largest_keys_times_queries():
    keys, queries = keys_of(90, 64), queries_of(64)
    read_back = fidelity.make_arm("think16", 64).key(keys, queries)
    for head in range(HEADS):
        of_head = queries[:, head * GROUP : (head + 1) * GROUP]
        worth = [
            float((of_head[..., d] ** 2).mean() * (keys[:, head, d] ** 2).mean()) for d in range(64)
        ]
        kept = sorted(range(64), key=worth.__getitem__)[-16:]
        dropped = [d for d in range(64) if d not in kept]
        assert not read_back[:, head, dropped].any()
        assert torch.equal(read_back[:, head, kept], keys[:, head, kept].bfloat16().float())


def test_spark_keeps_a_tokens_own_channels_and_refills_the_rest():
    keys, queries = keys_of(20, 32), queries_of(32)
    read_back = fidelity.make_arm("spark8", 32).key(keys, queries)
    kept_sets = set()
    for token in range(20):
        for head in range(HEADS):
            k, of_head = keys[token, head], queries[:, head * GROUP : (head + 1) * GROUP]
            norm = [float((of_head[..., d] ** 2).sum()) ** 0.5 for d in range(32)]
            worth = [float(k[d]) ** 2 * norm[d] for d in range(32)]
            order = sorted(range(32), key=worth.__getitem__)
            kept, dropped = order[-8:], order[:-8]
            kept_sets.add(tuple(sorted(kept)))
            mean = sum(worth[d] for d in dropped) / 24
            refilled = torch.tensor([(mean / norm[d]) ** 0.5 for d in dropped])
            assert torch.equal(read_back[token, head, kept], k[kept].bfloat16().float())
            expected = torch.where(k[dropped] < 0, -refilled, refilled)
            assert torch.allclose(read_back[token, head, dropped], expected, rtol=1e-4)
    assert len(kept_sets) > 20


def test_the_papers_rows_are_the_projection_on_what_the_queries_weigh():
    """On the span of top eigenvectors of W C W, from an exact eigen-solve; W of the group's mean
    query. The window decides: other queries give another span."""
    head_dim, rank = 32, 8
    # A wide gap behind the rank: the paper's few steps of iteration find no close eigenvalues.
    keys, queries = torch.randn(200, HEADS, head_dim), queries_of(head_dim)
    queries = queries * torch.where(torch.arange(head_dim) % 4 == 1, 30.0, 1.0)
    read_back = fidelity.make_arm(f"paper{rank}", head_dim).key(keys, queries)
    for head in range(HEADS):
        of_head = queries[:, head * GROUP : (head + 1) * GROUP].mean(1)
        weight = of_head.square().sum(0).sqrt()
        centred = keys[:, head] - keys[:, head].mean(0)
        scaled = centred * weight
        vectors = torch.linalg.eigh(scaled.T @ scaled)[1][:, -rank:]
        expected = centred @ vectors @ vectors.T
        difference = read_back[:, head] - keys[:, head].mean(0) - expected
        assert difference.square().sum() < 0.02 * expected.square().sum()
    other = fidelity.make_arm(f"paper{rank}", head_dim).key(keys, queries.flip(-1))
    assert (other - read_back).square().sum() > 0.1 * (keys - keys.mean(0)).square().sum()


def test_the_standard_error_takes_a_picture_as_one_cluster():
    result = fidelity.Result(
        512, kl_of=[(1.0, 2), (3.0, 2)], right_of=[(2, 2), (0, 2), (2, 2), (2, 2)]
    )
    summary = result.summary()
    assert (summary["answers"], summary["exact_match"]) == (8, 75.0)
    assert summary["standard_error"] == pytest.approx(25.0)
    assert (summary["kl_per_token"], summary["kl_standard_error"]) == (1.0, pytest.approx(0.5))
    assert fidelity.Result(512, kl_of=[(1.0, 2)]).summary()["kl_standard_error"] is None


def test_kl_and_right_answers_are_those_of_the_spans():
    ids = torch.tensor([0, 1, 2, 0, 1])
    trial = Trial([], [], (0, 2), ids, start=2, spans=[(3, 5)])
    exact = torch.tensor([[4.0, 0, 0], [0, 4, 0], [9, 9, 9]])
    other = torch.tensor([[2.0, 0, 0], [0, 0, 1], [9, 0, 0]])
    full, results = [], [fidelity.Result(512), fidelity.Result(256)]
    for result, logits in zip(results, (exact, other), strict=True):
        fidelity.record(result, logits, trial, full)
    assert results[0].right_of == [(1, 1)] and results[1].right_of == [(0, 1)]
    assert results[0].kl_of == [(0.0, 2)] and results[1].same_top == 1
    p, q = exact[:2].softmax(-1), other[:2].softmax(-1)
    assert results[1].kl_of[0][0] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


@pytest.fixture(scope="module")
def qwen(models) -> Checkpoint:
    return Checkpoint(models["reader_qwen2_5_vl"])


@pytest.mark.parametrize("protocol", ["B", "C", "D"])
@torch.inference_mode()
def test_a_protocol_codes_the_picture_and_judges_what_follows(qwen, protocol):
    (trial,) = qwen.trials(protocol, 1, HELD_OUT_SEED, "")
    picture = make_picture(next(iter(FAMILIES)), HELD_OUT_SEED)
    first, end = trial.coded
    is_image = trial.ids == qwen.image_token
    assert is_image[first:end].all() and is_image.sum() == end - first
    assert trial.exact[0][0].shape[2] == trial.start
    assert (trial.start == end) == (protocol == "B")
    said = [qwen.tokenizer.decode(trial.ids[low:high]) for low, high in trial.spans]
    answers = [question.answer for question in picture.questions]
    if protocol == "D":
        whole = qwen.tokenizer.decode(trial.ids[trial.start :], skip_special_tokens=True)
        assert whole == max(answers, key=len), "a trained model says the truth"
        assert trial.spans == [(trial.start + 1, len(trial.ids))]
    else:
        assert said == (answers if protocol == "B" else answers[1:])
    # The prompt ends in the first question, but for protocol B.
    tail = qwen.tokenizer.decode(trial.ids[end : trial.start])
    assert any(question.text in tail for question in picture.questions) == (protocol != "B")


@pytest.mark.parametrize("backbone", ["reader_qwen2_5_vl", "reader_llava_next"])
def test_coded_rows_are_closer_to_exact_than_fp8_on_a_trained_model(models, backbone, tmp_path):
    checkpoint = Checkpoint(models[backbone])
    names = ("full", "fp8/fp8", "16+z4/z4", "think32")
    arms = [fidelity.make_arm(name, checkpoint.head_dim) for name in names]
    results = fidelity.evaluate(checkpoint, arms, checkpoint.trials("B", 1, HELD_OUT_SEED, ""))
    summaries = {name: result.summary() for name, result in results.items()}
    assert summaries["full"]["kl_per_token"] == 0
    assert summaries["full"]["exact_match"] == 100, "not what the model says: positions are off"
    kl = [summaries[name]["kl_per_token"] for name in ("16+z4/z4", "fp8/fp8", "think32")]
    assert 0 < kl[0] < kl[1] < kl[2]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"model": backbone, "arms": summaries}))
    fidelity.plot([file], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert "16+z4/z4" in fidelity.table(summaries)


@pytest.fixture(scope="module")
def text_model(models, tmp_path_factory):
    """A text model with random weights, and the reader's tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("text-model")
    tokenizer = AutoTokenizer.from_pretrained(models["reader_qwen2_5_vl"])
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@torch.inference_mode()
def test_the_window_holds_the_prompts_last_queries_after_rope(text_model):
    """With the cached Keys they give the probabilities of the eager attention."""
    model = TextModel(text_model)
    ids = torch.randint(0, 40, (1, 100))
    cache, queries, _ = model.prefill({"input_ids": ids}, 90)
    config = model.text_model.config
    name, config._attn_implementation = config._attn_implementation, "eager"
    attentions = model.model(ids[:, :90], output_attentions=True).attentions
    config._attn_implementation = name
    for layer, of_layer in enumerate(attentions):
        keys = cache.layers[layer].keys[0]
        q = queries[layer].transpose(0, 1)
        assert q.shape == (2, WINDOW, 64)
        scores = q @ keys.repeat_interleave(len(q) // len(keys), 0).mT * model.head_dim**-0.5
        is_later = torch.arange(90) > torch.arange(90 - WINDOW, 90)[:, None]
        of_window = scores.masked_fill(is_later, float("-inf")).softmax(-1)
        assert torch.allclose(of_window, of_layer[0, :, -WINDOW:], atol=1e-4)


def test_a_text_is_judged_by_kl_alone(text_model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    model = TextModel(text_model)
    arms = [fidelity.make_arm(name, model.head_dim) for name in ("full", "16+z4/z4", "think16")]
    (trial,) = model.trials([file], prefix=200, scored=50)
    assert model.name == text_model.name
    assert trial.coded == (1, 200) and trial.spans == [(201, 251)] and len(trial.ids) == 251
    results = fidelity.evaluate(model, arms, [trial])
    full, coded_rows, think = (result.summary() for result in results.values())
    assert full["kl_per_token"] == 0 and full["tokens"] == 50 and full["exact_match"] is None
    assert 0 < coded_rows["kl_per_token"] < think["kl_per_token"]
    assert full["same_top_token"] == 100 > think["same_top_token"]
    with torch.inference_mode():
        whole = model.model(trial.ids[None]).logits[0, 200:251]
        cache = fidelity.read_back(trial, arms[0], {})
        again = model.continue_from(cache, trial.ids, 200)
    assert torch.allclose(again, whole, atol=1e-3), "positions are off"
    with pytest.raises(ValueError, match="more than 5000 are needed"):
        next(model.trials([file], prefix=4000, scored=1000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of MODEL"),
        (["model", "--text-model", "dir", "--texts", "a"], "one of MODEL"),
        (["--text-model", "dir"], "need each other"),
        (["model", "--question", "What?"], "of --protocol D"),
        (["model", "--arms", "int9"], "Keys of an arm must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        fidelity.parse(arguments)
    assert message in capsys.readouterr().err
