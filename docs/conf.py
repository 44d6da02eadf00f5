"""Sphinx configuration: `sphinx-build -W --keep-going docs site` builds the pages offline; warnings are errors."""

import importlib.metadata
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "segjax"
author = "The segjax authors"
copyright = "The segjax authors"
release = version = importlib.metadata.version("segjax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["_build", "tables", "**.ipynb_checkpoints"]
root_doc = "index"
# Flags keep their two hyphens, and `name` in docstrings is code.
smartquotes = False
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = "segjax"
html_static_path = ["_static"]
html_css_files = ["segjax.css"]
html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Tutorials are executed at every build: a tutorial that fails is an error of the build.
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app: Sphinx) -> None:
    sys.path.insert(0, str(HERE))
    import generated

    app.connect("builder-inited", lambda app: generated.write(HERE))
