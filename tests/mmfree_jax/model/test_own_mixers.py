"""A token mixer that the package does not have, by MODULE:NAME; page_mixer is a page's."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest

from mmfree_jax import load_pretrained, save_pretrained
from mmfree_jax.cli.main import main
from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.mixer_pattern import period_of
from mmfree_jax.model import LanguageModel, mixers
from mmfree_jax.model.packing import not_packed
from mmfree_jax.model.parameters import param_shapes, unflatten
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import make_mesh, param_shardings

OWN = ModelConfig(
    mixer="page_mixer:LEAKY", vocab_size=16, hidden_size=8, num_layers=2, intermediate_size=8
)


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module that is found in the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return write


@pytest.mark.parametrize(
    ("text", "period", "kept"),
    [
        ("a.b:C", ("a.b:C",), "a.b:C"),
        ("a:M,a:M:2", ("a:M",), "a:M"),
        ("mlgru, a:M : 2", ("mlgru", "a:M", "a:M"), "mlgru,a:M:2"),
        ("a:M:3,attention", ("a:M", "a:M", "a:M", "attention"), "a:M:3,attention"),
    ],
)
def test_its_name_stands_wherever_a_mixers_name_may(text, period, kept):
    assert period_of(text) == period
    assert ModelConfig(mixer=text, num_layers=4).mixer == kept


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("leaky", r"mixer is 'leaky': choose one of mlgru.* MODULE:NAME of a mixer of your own"),
        ("leaky:3", r"MODULE:NAME of a mixer of your own"),
        ("mlgru:M", r"write a number of layers behind mlgru:"),
        ("a:M:N", r"write a number of layers behind a:M:"),
        ("a:M:0", r"write a number of layers behind a:M:"),
        ("a/b:M", r"MODULE:NAME of a mixer of your own"),
    ],
)
def test_what_is_no_name_is_refused(text, told):
    with pytest.raises(ConfigError, match=told):
        ModelConfig(mixer=text)


def test_what_a_name_leads_to_is_looked_at(write_module):
    write_module("own_broken", "import no_such_package\n")
    write_module("own_raising", "raise RuntimeError('two\\nlines')\n")
    write_module("own_other", "MINE = 3\n")
    for name, told in {
        "own_absent:M": r"own_absent cannot be imported \(No module named 'own_absent'\); set it",
        "own_broken:M": r"cannot be imported \(No module named 'no_such_package'\)",
        "own_raising:M": r"cannot be imported \(RuntimeError: two lines\)",
        "own_other:M": r"own_other has no M; name a mixer of it",
        "own_other:MINE": r"that is of type int; name a mmfree_jax\.model\.mixer\.Mixer",
    }.items():
        with pytest.raises(ConfigError, match=rf"^model\.mixer is '{name}': .*{told}"):
            mixers.mixer_of(name)


def test_a_command_says_so_in_one_line(capsys):
    assert main(["info", "--preset", "tiny", "--model.mixer", "own_absent:M"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "model.mixer is 'own_absent:M': own_absent cannot be imported" in told[0]


def test_a_saved_model_needs_the_module(tmp_path, write_module):
    write_module("own_leaving", "from page_mixer import LEAKY\n")
    config = dataclasses.replace(OWN, mixer="own_leaving:LEAKY")
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_pretrained(tmp_path / "model", model, params)
    found, again = load_pretrained(tmp_path / "model")
    assert found.config.mixer == "own_leaving:LEAKY"
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, again))
    (tmp_path / "own_leaving.py").unlink()
    mixers.mixer_of.cache_clear()
    del sys.modules["own_leaving"]
    with pytest.raises(ConfigError, match="own_leaving cannot be imported"):
        load_pretrained(tmp_path / "model")


def test_without_a_packed_form_it_runs_ternary(write_module):
    write_module("own_plain", "from page_mixer import LEAKY\nM = LEAKY._replace(packed=None)\n")
    assert not_packed(dataclasses.replace(OWN, mixer="own_plain:M")) == ["model.mixer"]
    assert not_packed(OWN) == []


def test_it_is_called_ternary_for_its_products_are_not_known():
    assert OWN.family == "ternary-page_mixer:LEAKY"


def test_shapes_that_do_not_divide_over_a_mesh_are_refused():
    shapes = unflatten(param_shapes(dataclasses.replace(OWN, hidden_size=6)))
    mesh = make_mesh(MeshConfig(tensor=4), jax.devices()[:4])
    told = r"blocks/mixer/g_proj/weight has 6 rows or columns to split over mesh\.tensor \(4\)"
    with pytest.raises(ConfigError, match=told):
        param_shardings(mesh, {"blocks": {"mixer": shapes["blocks"]["mixer"]}})


def test_groups_that_share_a_scale_fill_the_inputs(write_module):
    write_module(
        "own_narrow",
        "import flax.linen as nn\n"
        "from page_mixer import LEAKY\n"
        "from mmfree_jax.model.mixer import projections\n"
        "class Narrow(nn.Module):\n"
        "    config: object\n"
        "    @nn.compact\n"
        "    def __call__(self, x, *rest):\n"
        "        projections(self.config, {'o_proj': (128, 96)})\n"
        "M = LEAKY._replace(module=Narrow)\n",
    )
    config = dataclasses.replace(
        OWN, mixer="own_narrow:M", hidden_size=128, intermediate_size=128, weight_scale="groups"
    )
    with pytest.raises(ConfigError, match="o_proj of the mixer has 96 inputs, no multiple of 128"):
        param_shapes(config)
