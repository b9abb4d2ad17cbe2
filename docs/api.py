"""The page of the public functions and classes, from their docstrings."""

from __future__ import annotations

import pdoc.doc
import pdoc.render
from markupsafe import Markup

import sasa_bench


def page() -> str:
    """The page, one HTML document that needs nothing else."""
    for name in sasa_bench.__all__:  # pdoc documents what is there, and these are imported on first use
        setattr(sasa_bench, name, getattr(sasa_bench, name))
    pdoc.render.configure(docformat="markdown", show_source=False, search=False, include_undocumented=False)
    pdoc.render.env.filters["to_html"] = _as_written
    module = pdoc.doc.Module(sasa_bench)
    return pdoc.render.html_module(module, {module.fullname: module})


def _as_written(docstring: str) -> str:
    # Docstrings here align what they list, and Markdown would run the lines together.
    return Markup('<pre style="white-space: pre-wrap; font-size: 0.85em">{}</pre>').format(docstring)
