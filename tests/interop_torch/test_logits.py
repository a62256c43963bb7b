"""Logits, gradients and names of exports under transformers, for every model that exports."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="torch is not installed: run make torch")

from mmfree_jax import infer  # noqa: E402
from mmfree_jax.model_config import DENSE, ModelConfig  # noqa: E402
from mmfree_jax.saved.convert import export_hf, import_hf  # noqa: E402
from mmfree_jax.saved.open_model import open_model  # noqa: E402
from mmfree_jax.saved.pack import pack  # noqa: E402
from mmfree_jax.saved.pretrained import load_pretrained  # noqa: E402

PLAIN = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_layers=3,
    intermediate_size=24,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
OPTIONS = {
    "plain": {},
    "no_bound": {"use_lower_bound": False},
    "expand": {"use_lower_bound": False, "expand_ratio": 1.5},
    "shared_conv": {"short_conv": 4},
    "separate_conv": {"short_conv": 3, "share_short_conv": False},
    "eps": {"linear_norm_eps": 1e-2, "norm_eps": 1e-3},
    "glu_size": {"intermediate_size": None},
    "llama": {
        "mixer": "attention",
        "mixer_linear": DENSE,
        "glu_linear": DENSE,
        "head_linear": DENSE,
        "num_heads": 4,
        "num_kv_heads": 2,
        "rope_theta": 500.0,
        "norm_eps": 1e-5,
    },
}
TOKENS = np.random.default_rng(1).integers(0, 48, (2, 37))


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_our_logits(export, name):
    exported = export(dataclasses.replace(PLAIN, **OPTIONS[name]))
    model, info = exported.torch_model(output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found, expected = theirs(model, TOKENS), exported.logits(TOKENS)
    assert found.dtype == np.float32
    # Random weights: one rounding that falls the other way would move a token's logits by a few
    # percent. Most tokens see none.
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 1e-5
    assert relative(found, expected) < 2e-2


def test_a_trained_model_gives_our_logits_and_text(trained):
    model = trained.torch_model()
    rows = np.random.default_rng(2).integers(97, 123, (4, 200))
    found, expected = theirs(model, rows), trained.logits(rows)
    assert relative(found, expected) < 1e-3
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    for prompt in ("we hold", "self", "that all"):
        ids = [256, *prompt.encode()]
        ours = infer.generate(
            trained.model, trained.params, [ids], max_new_tokens=200, temperature=0.0
        )
        text = model.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False)
        assert text[0, len(ids) :].tolist() == ours.tokens[0]
        assert len(ours.tokens[0]) == 200


@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_a_packed_model_keeps_its_trits(trained, tmp_path, bits):
    pack(open_model(trained.ours), tmp_path / "packed", bits=bits, embedding="float32")
    export_hf(tmp_path / "packed", tmp_path / "hf")
    packed = dataclasses.replace(trained, folder=tmp_path / "hf")
    model = packed.torch_model()
    rows = np.random.default_rng(2).integers(97, 123, (4, 200))
    assert relative(theirs(model, rows), trained.logits(rows)) < 1e-3
    size = (tmp_path / "hf/model.safetensors").stat().st_size
    assert size < (trained.folder / "model.safetensors").stat().st_size / 4
    model.save_pretrained(tmp_path / "again")
    again = dataclasses.replace(trained, folder=tmp_path / "again").torch_model()
    np.testing.assert_array_equal(theirs(again, rows), theirs(model, rows))


@pytest.fixture
def released(authors_package, tmp_path):
    """The authors' small model, imported and exported: the export."""
    (tmp_path / "released").mkdir()
    shutil.copy(authors_package / "dev_config.json", tmp_path / "released/config.json")
    shutil.copy(authors_package / "dev_model.safetensors", tmp_path / "released/model.safetensors")
    import_hf(tmp_path / "released", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "hf")
    return tmp_path / "hf"


def test_the_authors_logits_loss_and_gradients(authors_package, released):
    from transformers import AutoModelForCausalLM

    expected = load_file(authors_package / "dev_fused.safetensors")
    model = AutoModelForCausalLM.from_pretrained(released, trust_remote_code=True)
    ids = torch.tensor(expected["input_ids"], dtype=torch.long)
    output = model(ids, labels=ids)
    assert relative(output.logits.detach().numpy(), expected["logits"]) < 1e-5
    assert output.loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    output.loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert {f"grad.{name}" for name in gradients} == {n for n in expected if n.startswith("grad.")}
    for name, gradient in gradients.items():
        assert relative(gradient, expected[f"grad.{name}"]) < 1e-4, name


def test_the_names_are_those_of_the_authors_checkpoint(authors_package, released, tmp_path):
    """Also in what transformers saves again: their package loads both."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(released, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    theirs = load_file(authors_package / "dev_model.safetensors")
    again = load_file(tmp_path / "again/model.safetensors")
    assert {name: x.shape for name, x in again.items()} == {n: x.shape for n, x in theirs.items()}
    fields = json.loads((authors_package / "dev_config.json").read_text())
    saved = json.loads((tmp_path / "again/config.json").read_text())
    for name in ("transformers_version", "bos_token_id", "eos_token_id"):
        del fields[name]  # there is no tokenizer here
    # A field that transformers leaves out has the default that their class gives it, too.
    assert {name: saved.get(name, fields[name]) for name in fields} == fields


def test_their_package_goes_before_the_code_in_the_folder(released):
    """Where `hgrn_bit` is known to transformers, nobody is asked to trust code."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

    class TheirConfig(PretrainedConfig):
        model_type = "hgrn_bit"

    class TheirModel(PreTrainedModel):
        config_class = TheirConfig

        def __init__(self, config):
            super().__init__(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    AutoConfig.register("hgrn_bit", TheirConfig)
    AutoModelForCausalLM.register(TheirConfig, TheirModel)
    try:
        assert type(AutoModelForCausalLM.from_pretrained(released)) is TheirModel
    finally:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        del CONFIG_MAPPING._extra_content["hgrn_bit"]
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[TheirConfig]


def test_bfloat16_is_that_of_the_same_rounded_weights(trained, tmp_path):
    export_hf(trained.ours, tmp_path / "rounded", dtype="bfloat16")
    model, params = load_pretrained(tmp_path / "rounded", compute_dtype=jnp.bfloat16)
    rows = np.random.default_rng(2).integers(97, 123, (4, 200))
    expected = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, rows)
    asked = {"dtype": torch.bfloat16}
    for folder, options in ((trained.folder, asked), (tmp_path / "rounded", {})):
        found = dataclasses.replace(trained, folder=folder).torch_model(**options)
        assert found.dtype == torch.bfloat16
        logits = theirs(found, rows)
        assert logits.dtype == np.float32
        assert relative(logits, np.asarray(expected)) < 6e-2
        assert np.mean(logits.argmax(-1) == np.asarray(expected).argmax(-1)) > 0.9


def test_half_precision_sums_do_not_overflow(export):
    """K int8 inputs of one sign and trits of one sign: a sum of 600 * 127 is beyond float16."""
    exported = export(dataclasses.replace(PLAIN, intermediate_size=600))
    half, full = exported.torch_model(dtype=torch.float16), exported.torch_model()
    layer = half.model.layers[0].mlp.down_proj
    with torch.no_grad():
        for model in (half, full):
            for parameter in model.model.layers[0].mlp.down_proj.parameters():
                parameter.fill_(1.0)
        x = torch.ones(1, 600)
        found = layer(x).float()
        expected = full.model.layers[0].mlp.down_proj(x)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 40])
def test_products_of_few_and_of_many_rows_are_the_same(export, rows):
    """Integers on CPUs that multiply those quicker, floats elsewhere."""
    import sys

    model = export(PLAIN).torch_model().eval()
    layer = model.model.layers[1].mlp.gate_proj
    module = sys.modules[type(layer).__module__]
    torch.manual_seed(0)
    q = torch.randint(-127, 128, (rows, 16)).float()
    trits, _ = layer.ternary()
    expected = q.double() @ trits.double().T
    assert torch.equal(module._product(q, trits).double(), expected)
    assert torch.equal(module._product(q, trits.bfloat16()).double()[:, :4], expected[:, :4]) or (
        rows < module._INT8_ROWS or not module._HAS_INT8
    )
