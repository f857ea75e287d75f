"""How the pages are made: ``make docs``. Nothing is fetched while they are built, and warnings are errors."""

import normops

project = "normops"
author = "The normops authors"
copyright = "The normops authors"
version = release = normops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
root_doc = "index"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
# The signatures of torch's classes are the signatures of ours; their documentation is not repeated.
autodoc_inherit_docstrings = False

# A reference that leads nowhere is an error, but to what other projects document.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|nn|_Model|typing|collections)\b.*"), ("py:class", "optional")]

html_theme = "furo"
html_title = "normops"
html_copy_source = False
html_show_sphinx = False
# Without a network the formulas stay readable as TeX.
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
