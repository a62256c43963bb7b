"""Licences and credits of a model's card, in whatever is made of the model."""

import shutil
from pathlib import Path

import pytest
import yaml

from mmfree_jax.cli.main import main
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack
from mmfree_jax.saved.source_card import read_source_card

OLD = Path(__file__).parent / "old"
PUBLISHED = Path(__file__).parents[3] / "experiments/results/models/61M"
CREDITS = """## Data, licences, attribution

| source | licence |
|---|---|
| a-book | CC BY 4.0 |

### Credits to others

by B."""
TEXT = f"""# old

```sh
# licence: this line is a program's
```

## Training

43 steps.

{CREDITS}

## Limits

None.
"""


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A packed model with a card and a legal text, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "packed", "packed")
    Path("packed/README.md").write_text(TEXT)
    Path("packed/NOTICE").write_text("Made by B.\n")
    return Path("packed")


def exported(source, *options):
    assert main(["export-hf", str(source), "hf", *options, "--overwrite"]) == 0
    _, front, text = Path("hf/README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_an_export_says_what_the_packed_model_s_card_says(packed):
    front, text = exported(packed)
    assert "license" not in front  # the card names none for the model
    assert f"\n\n#{CREDITS}\n\n## Use" in text
    assert "Exported from packed, whose own card lies beside this one" in text
    assert "43 steps" not in text
    assert "[SOURCE_README.md](SOURCE_README.md)" in text
    assert Path("hf/SOURCE_README.md").read_text() == TEXT
    assert Path("hf/NOTICE").read_text() == "Made by B.\n"


def test_what_is_packed_again_and_exported_for_onnx_carries_them_too(packed):
    pack(open_model(packed), "again", bits="1.6")
    assert not Path("again/README.md").exists()  # it would speak of another file
    assert f"\n\n#{CREDITS}\n\n## Use" in exported("again")[1]
    assert main(["export", "onnx", "--model", "again", "--out", "edge", "--no-web"]) == 0
    assert Path("edge/SOURCE_README.md").read_text() == TEXT


def test_the_front_matter_s_licence_is_kept_unless_another_is_given(packed):
    stated = "license: other\nlicense_name: mine\nlicense_link: {}"
    for link, kept in (("LICENSE.md", None), ("NOTICE", "NOTICE"), ("../x", None)):
        Path("packed/README.md").write_text(f"---\n{stated.format(link)}\n---\n{TEXT}")
        front, _ = exported(packed)
        assert (front["license"], front["license_name"]) == ("other", "mine")
        assert front.get("license_link") == kept
    front, _ = exported(packed, "--model-license", "mit")
    assert front["license"] == "mit"
    assert "license_name" not in front


@pytest.mark.parametrize("card", ["", "---\nlicense: [\n---\n# x", "---\nlicense: 3\n---\n# x"])
def test_a_card_that_names_none_adds_none(packed, card):
    (packed / "README.md").write_text(card)
    front, text = exported(packed)
    assert "license" not in front
    assert "word for word" not in text


def test_a_run_s_notes_are_its_owner_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", "run")
    Path("run/README.md").write_text(TEXT)
    assert "a-book" not in exported("run")[1]
    assert not Path("hf/SOURCE_README.md").exists()


def test_a_card_that_cannot_be_read_is_one_line(packed, capsys):
    (packed / "README.md").write_bytes(b"\xff\xff\xff\xff")
    assert main(["export-hf", "packed", "hf"]) == 2
    error = capsys.readouterr().err
    assert "packed/README.md cannot be read" in error
    assert error.count("\n") == 1


def test_the_published_model_s_sources_are_found():
    card = read_source_card(PUBLISHED, "packed")
    assert card is not None
    (section,) = card.sections
    assert section.startswith("## Data, licences, attribution\n\n| source |")
    assert "CC BY 4.0" in section
    assert section.endswith("are credited by this table.")
