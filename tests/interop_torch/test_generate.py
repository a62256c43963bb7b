"""Generation with exports: the state as cache, padding, beams, the pipeline."""

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run make torch")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)

from mmfree_jax import infer  # noqa: E402
from mmfree_jax.model_config import ModelConfig  # noqa: E402
from mmfree_jax.saved.convert import export_hf  # noqa: E402
from mmfree_jax.saved.end_tokens import end_ids  # noqa: E402
from mmfree_jax.saved.open_model import open_model  # noqa: E402
from mmfree_jax.saved.pack import pack  # noqa: E402

PLAIN = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
CONVOLUTIONS = {
    "none": {},
    "shared": {"short_conv": 4},
    "separate": {"short_conv": 3, "share_short_conv": False},
}
PROMPTS = [[7, 3, 9, 11, 2], [5, 1], list(range(1, 20))]


@pytest.fixture(scope="module", params=CONVOLUTIONS)
def model(export, request):
    return export(dataclasses.replace(PLAIN, **CONVOLUTIONS[request.param])).torch_model()


@pytest.fixture(scope="module")
def plain(export):
    return export(PLAIN).torch_model()


def padded(prompts, side):
    width = max(map(len, prompts))
    pads = [[0] * (width - len(p)) for p in prompts]
    left = side == "left"
    rows = [q + p if left else p + q for p, q in zip(prompts, pads, strict=True)]
    ones = [[1] * len(p) for p in prompts]
    masks = [q + m if left else m + q for m, q in zip(ones, pads, strict=True)]
    return torch.tensor(rows), torch.tensor(masks)


def greedy(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **options)


def test_with_and_without_the_state_the_text_is_the_same(model):
    ids = torch.tensor(PROMPTS[2:])
    without = greedy(model, ids, use_cache=False)
    assert greedy(model, ids, use_cache=True).tolist() == without.tolist()


def test_left_padding_changes_no_text(model):
    batch = greedy(model, *padded(PROMPTS, "left"))
    for row, prompt in zip(batch, PROMPTS, strict=True):
        alone = greedy(model, torch.tensor([prompt]))
        assert row[-24:].tolist() == alone[0, -24:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_touches_neither_logits_nor_state(model, side):
    """Whatever stands in it, on either side, and what is read after it."""
    ids, mask = padded(PROMPTS, side)
    follow = torch.tensor([[4], [8], [6]])
    ids[mask == 0] = 31
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        whole = torch.cat([mask, torch.ones_like(follow)], dim=1)
        state = output.to_tuple()[1]
        after = model(follow, attention_mask=whole, past_key_values=state).logits
        for i, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([[*prompt, follow[i, 0].item()]])).logits[0]
            found = torch.cat([output.logits[i][mask[i] == 1], after[i]])
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_a_text_in_pieces_gives_the_logits_of_the_whole(model):
    ids = torch.tensor(PROMPTS[2:])
    with torch.no_grad():
        whole, state, parts = model(ids).logits, None, []
        for piece in ids.split([1, 7, 1, 10], dim=1):
            output = model(piece, past_key_values=state, use_cache=True)
            state = output.to_tuple()[1]
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert state.get_seq_length() == 19
    # As much as after one token.
    sizes = [sum(x.numel() for x in layer.values()) for layer in state.layers]
    model(ids[:, :1], past_key_values=state, use_cache=True)
    assert [sum(x.numel() for x in layer.values()) for layer in state.layers] == sizes


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_carry_their_states(model, options):
    ids, mask = padded(PROMPTS[:2], "left")
    with_state = greedy(model, ids, mask, use_cache=True, **options)
    assert with_state.tolist() == greedy(model, ids, mask, use_cache=False, **options).tolist()


def test_generation_goes_on_from_a_returned_state(plain):
    ids = torch.tensor(PROMPTS[2:])
    whole = greedy(plain, ids)
    first = greedy(plain, ids, max_new_tokens=10, return_dict_in_generate=True)
    state = first.to_tuple()[-1]
    assert state.get_seq_length() == 19 + 9  # the last token was predicted, not read
    rest = greedy(plain, first.sequences, max_new_tokens=14, cache=state)
    assert rest.tolist() == whole.tolist()


def test_a_state_cannot_go_back(plain):
    with torch.no_grad():
        state = plain(torch.tensor([[1, 2, 3]]), use_cache=True).to_tuple()[1]
    with pytest.raises(ValueError, match="read 3 tokens and 2 are given: a recurrent state cannot"):
        greedy(plain, torch.tensor([[1, 2]]), cache=state)


def test_generation_from_embeddings(plain):
    ids = torch.tensor(PROMPTS[2:])
    text = plain.generate(
        inputs_embeds=plain.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids),
        max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert text[0].tolist() == greedy(plain, ids)[0, 19:].tolist()


def test_logits_are_made_where_they_are_asked_for(plain):
    ids = torch.tensor(PROMPTS[2:])
    with torch.no_grad():
        whole = plain(ids).logits
        torch.testing.assert_close(plain(ids, logits_to_keep=3).logits, whole[:, -3:])
        places = torch.tensor([0, 5])
        torch.testing.assert_close(plain(ids, logits_to_keep=places).logits, whole[:, places])


def test_hidden_states_and_tuples(plain):
    ids = torch.tensor(PROMPTS[2:])
    with torch.no_grad():
        output = plain(ids, output_hidden_states=True)
        assert [tuple(x.shape) for x in output.hidden_states] == [(1, 19, 16)] * 3
        head = plain.lm_head(output.hidden_states[-1])
        torch.testing.assert_close(head, output.logits)
        logits, state = plain(ids, return_dict=False, use_cache=True)
        torch.testing.assert_close(logits, output.logits)
        assert state.get_seq_length() == 19


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_writes_our_text(trained, batch_size):
    tokenizer = AutoTokenizer.from_pretrained(trained.folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    write = pipeline("text-generation", trained.torch_model(), tokenizer=tokenizer)
    prompts = ["we hold", "these truths to be", "all"]
    found = write(prompts, batch_size=batch_size, max_new_tokens=40, do_sample=False)
    ids = [[256, *p.encode()] for p in prompts]
    ours = infer.generate(
        trained.model, trained.params, ids, max_new_tokens=40, temperature=0.0, stop_ids=[257]
    )
    for prompt, texts, tokens in zip(prompts, found, ours.tokens, strict=True):
        assert texts[0]["generated_text"] == prompt + bytes(tokens).decode()


def test_weights_that_change_are_ternarised_again(plain):
    """The trits that evaluation keeps are those of the weights that are there."""
    layer = plain.model.layers[0].mlp.down_proj
    x = torch.randn(2, 24)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        layer.weight.neg_()
        torch.testing.assert_close(layer(x), -before)
        layer.weight.neg_()
        assert layer.bfloat16()(x).dtype == torch.bfloat16
        assert layer.ternary()[0].dtype == torch.bfloat16
        layer.float()


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_weights_that_change_by_their_data_are_seen_by_the_next_text(export, call):
    """As optimisers, averages and merged adapters change them: no tensor counts such a change."""
    model = export(PLAIN).torch_model()
    ids = torch.tensor([PROMPTS[0]])

    def read():
        if call == "generate":
            scores = greedy(model, ids, max_new_tokens=2, output_logits=True,
                            return_dict_in_generate=True).logits  # fmt: skip
            return torch.stack(scores)
        return model(ids).logits

    with torch.no_grad():
        before = read()
        for weight in (model.model.layers[1].attn.o_proj.weight, model.lm_head.weight):
            weight.data.neg_()
        changed = read()
        model.train()
        model.eval()
        assert torch.equal(changed, read())
        assert not torch.equal(changed, before)


def test_a_packed_model_takes_other_weights(export, tmp_path):
    ours = export(PLAIN).ours
    pack(open_model(ours), tmp_path / "packed")
    export_hf(tmp_path / "packed", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model(ids).logits
        # Their negatives: packed trits are one more than what they stand for.
        names = ("lm_head.packed", "lm_head.scale")
        tensors = {name: model.state_dict()[name].clone() for name in names}
        model.load_state_dict({names[0]: 0xAA - tensors[names[0]]}, strict=False)
        torch.testing.assert_close(model(ids).logits, -before)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\), not \[2, 5\]"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask has shape \(1, 5\), not \[2, 5\]"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, "position_ids begin again"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, "position_ids begin again"),
        ({"output_attentions": True}, "has no attentions"),
        ({"past_key_values": DynamicCache()}, "the state is a DynamicCache"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "input_ids hold no tokens"),
    ],
)
@pytest.mark.parametrize("door", ["model", "base"])
def test_what_it_has_not_is_refused_in_one_line(plain, given, match, door):
    model = plain if door == "model" else plain.model
    with pytest.raises(ValueError, match=match) as e:
        model(**{"input_ids": torch.arange(10).reshape(2, 5)} | given)
    assert "\n" not in str(e.value)


def test_a_state_of_other_rows_or_of_another_model_is_refused(export, plain):
    ids = torch.arange(10).reshape(2, 5)
    state = plain(ids, use_cache=True)[-1]
    with pytest.raises(ValueError, match="the state is of 2 rows, 1 are given"):
        plain(ids[:1], past_key_values=state)
    deeper = export(dataclasses.replace(PLAIN, num_layers=3)).torch_model()
    with pytest.raises(ValueError, match="the state has 2 layers, the model 3"):
        deeper(ids, past_key_values=state)


def test_positions_of_padded_rows_are_taken(plain):
    ids, mask = padded(PROMPTS, "left")
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        given = plain(ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(given, plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 2}, {"eos_token_id": [2, 5]}]
)
def test_the_tokens_that_end_a_text_are_those_of_transformers(plain, tmp_path, generation):
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": [7, 2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    theirs = type(plain).from_pretrained(tmp_path).generation_config.eos_token_id
    theirs = [theirs] if isinstance(theirs, int) else theirs
    assert end_ids(tmp_path) == tuple(theirs or ())
