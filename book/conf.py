"""How Sphinx builds the book: from the lessons, the pages beside this file and the package itself.

The built pages load nothing from elsewhere.  Formulas become MathML, which browsers draw by
themselves.
"""

import os
import sys
from pathlib import Path

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))
import forked_kernel
import generate

ROOT = Path(__file__).parents[1]
# On busy cores threads that wait for each other cost more than they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
generate.write_all(ROOT / "book" / "_generated")
forked_kernel.fork_kernels()

project = "minipaged"
author = "the minipaged authors"
project_copyright = author
root_doc = "book/index"
extensions = ["myst_nb", "sphinx_design"]
include_patterns = ["book/**", "lessons/**"]
exclude_patterns = [
    "**/_build",
    "**/.*",
    "lessons/**/*.ipynb",
    "lessons/**/stubs",
    "book/_generated/*.md",  # included in other pages
]
templates_path = []

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "book" / "_build" / "cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_output_stderr = "remove"
numfig = True

html_theme = "sphinx_book_theme"
html_title = "minipaged"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_math_renderer = "mathml"


def visit_math(self, node):
    """A formula in a line."""
    self.body.append(convert(node.astext()))
    from docutils import nodes

    raise nodes.SkipNode


def visit_math_block(self, node):
    """A formula by itself."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    from docutils import nodes

    raise nodes.SkipNode


def setup(app):
    """Draw formulas as MathML."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
