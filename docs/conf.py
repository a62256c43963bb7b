"""The documentation site: the Markdown files of this folder, as they are on the forge.

`site_pages/` puts in what is made from the code: commands, settings, the API.
"""

import os
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

_project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))

project = "mmfree_jax"
author = "the mmfree_jax authors"
copyright = author
version = release = _project["project"]["version"]
repository = _project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
    "site_pages",
]
# Names under "Attributes:" are references too, and several classes have a `tokens`.
suppress_warnings = ["ref.python"]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = f"mmfree_jax {release}"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
if repository:
    html_theme_options |= {"repository_url": repository, "use_repository_button": True}

# Headings are linked to as on the forge, and formulas are written as there.
myst_heading_anchors = 6
myst_fence_as_directive = ["mermaid"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
# The notebooks keep their outputs; `make test` runs them.
nb_execution_mode = "off"

default_role = "code"  # docstrings have names in single backticks
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
templates_path: list[str] = []

# Names of other projects become links where their inventories can be fetched: the build itself
# needs no network.
if os.environ.get("DOCS_INTERSPHINX") or os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax-linen.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_ignore = [r"http://(127\.0\.0\.1|localhost)"]
