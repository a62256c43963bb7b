"""The config of a run directory."""

import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.presets import preset
from mmfree_jax.saved.run_directory import load_config, write_config


def test_the_config_comes_back(tmp_path):
    write_config(tmp_path, preset("370M"))
    assert load_config(tmp_path) == preset("370M")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_missing_or_malformed_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="give the folder of a training run"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path)
