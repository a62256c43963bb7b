"""Exports that transformers trains, saves again, spreads over devices; and what it must not do."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run make torch")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import mmfree_jax  # noqa: E402
from mmfree_jax.model_config import ModelConfig  # noqa: E402
from mmfree_jax.saved.convert import export_hf  # noqa: E402
from mmfree_jax.saved.open_model import open_model  # noqa: E402
from mmfree_jax.saved.pack import pack  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    short_conv=3,
    share_short_conv=False,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
IDS = torch.arange(26).reshape(2, 13)


@pytest.fixture(scope="module")
def exported(export):
    return export(CONFIG)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_a_folder_that_transformers_saved_loads_in_both_worlds(exported, tmp_path):
    model = exported.torch_model()
    with torch.no_grad():
        model.model.embeddings.weight[3] += 1.0
    model.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    code = {file.name for file in exported.folder.glob("*.py")}
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == code
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(exported.torch_model()))
    ours, params = mmfree_jax.load_pretrained(tmp_path / "again")
    found = ours.apply({"params": params}, jnp.asarray(IDS.numpy()))
    torch.testing.assert_close(logits(model), torch.tensor(np.asarray(found)), rtol=1e-3, atol=1e-3)


def test_a_saved_tokenizer_gives_the_same_ids(trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("we hold").input_ids == tokenizer("we hold").input_ids == [256, *b"we hold"]


def test_fine_tuning_lowers_the_loss_and_comes_back(trained, tmp_path):
    model = trained.torch_model().train()
    ids = torch.tensor([[256, *b"truths are self evident to us all"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.eval().save_pretrained(tmp_path / "tuned")
    ours, params = mmfree_jax.load_pretrained(tmp_path / "tuned")
    found = np.asarray(ours.apply({"params": params}, jnp.asarray(ids.numpy())))
    expected = logits(model, ids).numpy()
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_the_trainer_of_transformers_trains_evaluates_and_saves(exported, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
        gradient_checkpointing=True, report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(exported.torch_model(), arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(logits(load(tmp_path / "out")), logits(trainer.model.eval()))


def test_the_gradients_are_ours(exported):
    """Of every parameter, through convolutions and recurrence, with padding on the left."""
    model = exported.torch_model().train()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # a text's first token is predicted by nothing
    model(IDS, attention_mask=mask, labels=labels).loss.backward()
    rows = [IDS[0], IDS[1, 4:]]

    def loss(params):
        total = 0.0
        for row in rows:
            tokens = jnp.asarray(row.numpy())[None]
            log_p = jax.nn.log_softmax(exported.model.apply({"params": params}, tokens)[0])
            total -= log_p[jnp.arange(len(row) - 1), tokens[0, 1:]].sum()
        return total / sum(len(row) - 1 for row in rows)

    expected = jax.jit(jax.grad(loss))(exported.params)
    blocks, found = expected["blocks"], model.model
    pairs = [
        (found.embeddings.weight, expected["embedding"]["weight"]),
        (found.lower_bounds, expected["lower_bounds"]),
        (model.lm_head.weight, expected["head"]["weight"]),
        (model.lm_head.norm.weight, expected["head"]["norm_scale"]),
    ]
    for i, layer in enumerate(found.layers):
        mixer = blocks["mixer"]
        pairs += [
            (layer.attn.i_conv1d.weight[:, 0], mixer["i_conv"]["kernel"][i]),
            (layer.attn.f_proj.weight, mixer["f_proj"]["weight"][i]),
            (layer.attn.g_norm.weight, mixer["gate_norm"]["scale"][i]),
            (layer.mlp.gate_proj.weight, blocks["glu"]["gate_up_proj"]["weight"][i]),
            (layer.mlp.down_proj.norm.weight, blocks["glu"]["down_proj"]["norm_scale"][i]),
        ]
    leaves = {p: p.grad for p in model.parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in leaves.values())
    for parameter, gradient in pairs:
        whole = parameter if parameter in leaves else layer_kernel(parameter, leaves)
        mine = leaves[whole].numpy().reshape(gradient.shape)
        assert np.linalg.norm(mine - gradient) < 5e-2 * np.linalg.norm(gradient)


def layer_kernel(view, leaves):
    """The parameter that a view is of."""
    return next(p for p in leaves if p.data_ptr() == view.data_ptr())


def test_checkpointed_gradients_are_the_same(exported):
    plain, checked = exported.torch_model().train(), exported.torch_model().train()
    enable = getattr(checked, "activation_checkpointing_enable", None)
    (enable or checked.gradient_checkpointing_enable)()
    calls = []
    inner = checked.model._gradient_checkpointing_func
    checked.model._gradient_checkpointing_func = lambda *a: calls.append(1) or inner(*a)
    for model in (plain, checked):
        model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2
    for a, b in zip(plain.parameters(), checked.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_autocast_gives_gradients_of_the_float_weights(exported):
    model = exported.torch_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(IDS, labels=IDS)
    assert output.logits.dtype == torch.float32
    output.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
    error = (output.logits - logits(exported.torch_model())).norm() / output.logits.norm()
    assert error < 0.1


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "cpu"},
        {"model.embeddings": "cpu", "model.lower_bounds": "cpu", "model.layers.0": "cpu",
         "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "disk"},
    ],
    ids=["auto", "one", "disk"],
)  # fmt: skip
def test_a_device_map_changes_nothing(exported, tmp_path, device_map):
    model = exported.torch_model(device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(exported.torch_model()))
    text = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = exported.torch_model().generate(
        IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert text.tolist() == plain.tolist()


def test_the_model_without_its_head(exported):
    model = AutoModel.from_pretrained(exported.folder, trust_remote_code=True)
    whole = exported.torch_model()
    with torch.no_grad():
        stream = model(IDS).last_hidden_state
        torch.testing.assert_close(whole.lm_head(stream), logits(whole))


def test_tied_embeddings_share_one_tensor(exported, tmp_path):
    """A field of the authors' config: the head's matrix is the embedding's, also when loaded."""
    config = copy.deepcopy(exported.torch_model().config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path / "tied")
    again = load(tmp_path / "tied")
    assert again.lm_head.weight is again.model.embeddings.weight
    assert torch.equal(logits(again), logits(model))
    ours, params = mmfree_jax.load_pretrained(tmp_path / "tied")
    found = torch.tensor(np.asarray(ours.apply({"params": params}, jnp.asarray(IDS.numpy()))))
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)


def test_more_tokens_keep_the_head_ternary(exported):
    model = exported.torch_model()
    model.resize_token_embeddings(56, mean_resizing=False)
    assert type(model.lm_head).__name__ == "BitLinear"
    assert logits(model).shape[-1] == 56
    assert model.lm_head.ternary()[0].unique().tolist() == [-1.0, 0.0, 1.0]


def test_a_packed_model_refuses_what_needs_float_weights(trained, tmp_path):
    pack(open_model(trained.ours), tmp_path / "packed")
    export_hf(tmp_path / "packed", tmp_path / "hf")
    model = dataclasses.replace(trained, folder=tmp_path / "hf").torch_model()
    ids = torch.tensor([[256, *b"we hold"]])
    # Norms and embedding can be trained; gradients reach them through the packed layers.
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters()} == {
        "embeddings", "norm", "attn_norm", "mlp_norm", "g_norm", "model",
    }  # fmt: skip


def test_a_quantiser_is_refused(exported, tmp_path):
    config = json.loads((exported.folder / "config.json").read_text())
    for file in exported.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config is set: the weights are ternary"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"expand_ratio": 2}, "expand_ratio is 2: not defined together with use_lower_bound"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(exported, tmp_path, change, match):
    config = json.loads((exported.folder / "config.json").read_text())
    for file in exported.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=match):
        load(tmp_path)
