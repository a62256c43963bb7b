"""The check of the built site sees what is wrong with one; conf.py asks no network by itself."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
HEAD = '<title>{0}</title><meta name="description" content="{0}">'


@pytest.fixture(scope="module")
def faults():
    return runpy.run_path(str(DOCS / "site_pages" / "check.py"))["faults"]


@pytest.fixture
def built(tmp_path):
    """A site of three pages that is as it should be."""
    start = f'{HEAD.format("start")}<a href="a/b.html#place">b</a><img src="x.png">'
    (tmp_path / "index.html").write_text(start)
    (tmp_path / "a").mkdir()
    back = '<p id="place"></p><a href="../index.html"></a><a href="#place"></a>'
    (tmp_path / "a" / "b.html").write_text(HEAD.format("b") + back)
    (tmp_path / "404.html").write_text(HEAD.format("none"))
    index = 'Search.setIndex({"docnames": ["index", "a/b", "404"]})'
    (tmp_path / "searchindex.js").write_text(index)
    return tmp_path


def test_a_site_as_it_should_be_has_no_faults(faults, built):
    assert faults(built) == []


@pytest.mark.parametrize(
    ("page", "added", "expected"),
    [
        ("index", '<a href="c.html">c</a>', ["index.html: c.html leads nowhere"]),
        ("index", '<a href="a/b.html#x">b</a>', ["index.html: a/b.html#x has no such place"]),
        ("a/c", HEAD.format("c"), ["a/c.html: no link leads here", "a/c.html: not in the search"]),
        ("404", "<script src='https://cdn.example.org/x.js'></script>",
         ["404.html: loads https://cdn.example.org/x.js"]),
    ],
)  # fmt: skip
def test_faults_are_told(faults, built, page, added, expected):
    file = built / f"{page}.html"
    file.write_text((file.read_text() if file.exists() else "") + added)
    assert faults(built) == expected


def test_names_of_pages(faults, built):
    file = built / "a" / "b.html"
    file.write_text(file.read_text().replace(HEAD.format("b"), "<title>start</title>"))
    assert faults(built) == [
        "a/b.html: no title, or no description",
        "index.html: the title 'start' is also that of a/b.html",
    ]


def configuration(monkeypatch, value):
    monkeypatch.setenv("DOCS_INTERSPHINX", value)
    return runpy.run_path(str(DOCS / "conf.py"))


def test_other_projects_are_asked_only_where_somebody_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("READTHEDOCS", "True")
    assert "sphinx.ext.intersphinx" not in configuration(monkeypatch, "")["extensions"]
    asked = configuration(monkeypatch, "1")
    assert "sphinx.ext.intersphinx" in asked["extensions"]
    assert asked["intersphinx_mapping"]["jax"] == ("https://docs.jax.dev/en/latest", None)
    kept = configuration(monkeypatch, str(tmp_path))["intersphinx_mapping"]
    assert kept["numpy"] == ("https://numpy.org/doc/stable", str(tmp_path / "numpy.inv"))
    with pytest.raises(SystemExit, match=r"DOCS_INTERSPHINX is 'yes': give 1, or a folder"):
        configuration(monkeypatch, "yes")
