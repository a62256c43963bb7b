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
    "site_pages",
]
# Names under "Attributes:" are references too, and several classes have a `tokens`.
suppress_warnings = ["ref.python"]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = f"mmfree_jax {release}"
# Where the site will stand, for canonical addresses and the page of those that are not there.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL") or os.environ.get("DOCS_URL", "")
highlight_language = "none"  # a block without a language is a terminal's
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
if repository:
    html_theme_options |= {"repository_url": repository, "use_repository_button": True}

# Headings are linked to as on the forge, and formulas are written as there.
myst_heading_anchors = 6
myst_enable_extensions = ["dollarmath", "colon_fence"]
# Each notebook is run whenever its page is read, in an empty folder of its own. An error in it is a
# warning, told with its traceback, and warnings are errors.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_execution_timeout = 600  # seconds for a cell

default_role = "code"  # docstrings have names in single backticks
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
templates_path: list[str] = []

# Names of other projects become links where somebody asks for it, so that the build needs no
# network: DOCS_INTERSPHINX=1 fetches their inventories, and a folder holds them as NAME.inv.
inventories = os.environ.get("DOCS_INTERSPHINX", "")
if inventories:
    if inventories != "1" and not Path(inventories).is_dir():
        raise SystemExit(f"DOCS_INTERSPHINX is {inventories!r}: give 1, or a folder of inventories")
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        name: (
            address,
            None if inventories == "1" else str(Path(inventories).resolve() / f"{name}.inv"),
        )
        for name, address in {
            "python": "https://docs.python.org/3",
            "numpy": "https://numpy.org/doc/stable",
            "jax": "https://docs.jax.dev/en/latest",
            "flax": "https://flax-linen.readthedocs.io/en/latest",
            "optax": "https://optax.readthedocs.io/en/latest",
        }.items()
    }

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_ignore = [r"http://(127\.0\.0\.1|localhost)"]
