"""What every page shares: the templates, inlined scripts, charts, tables and downloads as data: addresses."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import itables
import itables.options
import pandas as pd
import vl_convert
from itables import JavascriptFunction
from itables.javascript import generate_init_offline_itables_html
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from sasa_bench.report.charts.parts import Spec
from sasa_bench.report.table import has_parquet
from sasa_bench.report.table import render as as_file
from sasa_bench.results.cache import cache_directory, write_atomically
from sasa_bench.results.file import replace_text
from sasa_bench.results.format import percent, seconds, size
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import Conditions

BLANK = JavascriptFunction(
    "function (value, type) { return type === 'display' && String(value) === 'NaN' ? '' : value; }"
)
"""Shows nothing where there is no number."""
LARGEST_PLAIN = 1 << 20
"""A CSV with more bytes is embedded compressed."""


def render(template: str, **values: Any) -> str:
    """A page from sasa_bench/report/templates. Raises jinja2.UndefinedError for a value that the template misses."""
    return _environment().get_template(template).render(**values)


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading, the anchor of the heading, and what follows.

    link: words in the navigation; "" keeps it out.
    """

    anchor: str
    title: str
    link: str
    body: Markup


def section(anchor: str, title: str, link: str = "", **values: Any) -> Section:
    """The section whose body is the template sections/ANCHOR.html with these values."""
    return Section(anchor, title, link, Markup(render(f"sections/{anchor}.html", **values)))


def write(page: str, out: Path) -> None:
    """Write a page, whole or not at all; the folder is made."""
    replace_text(out, page)


@cache
def chart_script() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script for a page that has charts.

    To make it takes a second or two, so it is kept in the cache, by the version of what makes it.
    """
    kept = cache_directory() / f"charts-{metadata.version('vl-convert-python')}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Markup(kept.read_text(encoding="utf-8"))
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    with contextlib.suppress(OSError):
        write_atomically(kept, script.encode())
    return Markup(script)


@cache
def table_script() -> Markup:
    """DataTables as one script for a page that has tables."""
    return Markup(generate_init_offline_itables_html(itables.options.dt_bundle))


def as_json(spec: Spec) -> Markup:
    """A specification inside a script element."""
    return Markup(json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c"))


def code(text: str) -> Markup:
    """Names between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def sortable(
    shown: pd.DataFrame, identity: str, searched: Sequence[str], length: int = 25, wrapped: Sequence[str] = ()
) -> Markup:
    """A table that sorts by each column and filters by value in the `searched` ones, by text or number in the rest.

    Words of the `wrapped` columns may take several lines.
    """
    places, wraps = ([shown.columns.get_loc(name) for name in names] for names in (searched, wrapped))
    return Markup(
        itables.to_html_datatable(
            shown,
            connected=False,
            showIndex=False,
            table_id=identity,
            display_logo_when_loading=False,
            lengthMenu=[25, 100, 1000],
            pageLength=length,
            scrollX=True,
            maxBytes=0,
            format_floats_in_python=False,
            classes="display compact nowrap",
            style="width:100%",
            columnControl=["order", ["search"]],
            columnDefs=[
                {"targets": places, "columnControl": ["order", ["searchList"]]},
                {"targets": wraps, "className": "wraps"},
                {"targets": "_all", "render": BLANK},
            ],
            ordering={"indicators": False, "handler": True},
            layout={"topStart": "pageLength", "topEnd": {"search": {"placeholder": "in every column"}}},
        )
    )


def downloads(table: pd.DataFrame, name: str) -> list[dict[str, str]]:
    """The table as files to save from the page: label, file name and data: address of each."""
    csv = as_file(table, "csv")
    packed = len(csv) > LARGEST_PLAIN
    suffix, kind = (".csv.gz", "application/gzip") if packed else (".csv", "text/csv")
    files = [
        ("CSV" + (" (gzip)" if packed else ""), suffix, kind, gzip.compress(csv, 9, mtime=0) if packed else csv),
    ]
    if has_parquet():
        files.append(("Parquet", ".parquet", "application/vnd.apache.parquet", as_file(table, "parquet")))
    return [
        {"label": label, "name": name + suffix, "address": f"data:{kind};base64,{base64.b64encode(content).decode()}"}
        for label, suffix, kind, content in files
    ]


def describe(machine: Machine) -> dict[str, str]:
    """A machine in words: what -> value."""
    return {
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "instructions": ", ".join(machine.isa) or "–",
        "memory": size(machine.memory_bytes),
        "GPU": f"{machine.gpu} (driver {machine.driver})" if machine.gpu else "none",
        "system": f"{machine.os}, Python {machine.python}",
        "libraries": ", ".join(f"{name} {version}" for name, version in machine.libraries.items()),
        "worker environment": ", ".join(f"{name}={value}" for name, value in machine.environment.items()),
        "sasa-bench": machine.revision,
    }


def describe_all(machines: Sequence[Machine]) -> dict[str, str]:
    """Machines of one kind of hardware in words; where software or revision differ, every value."""
    found = [describe(machine) for machine in machines]
    return {key: " / ".join(dict.fromkeys(each[key] for each in found)) for key in found[0]}


def moment(found: Conditions) -> dict[str, str]:
    """What a machine was set to and busy with when a run began or ended, in words: what -> value, "–" for unknown."""
    shown: dict[str, tuple[object, Callable[[Any], str]]] = {
        "governor": (found.governor, str),
        "turbo": (found.turbo, str),
        "SMT": (found.smt, str),
        "quota": (found.quota, "{:g} processors".format),
        "load": (found.load, "{:g}".format),
        "waited for a processor": (found.pressure, percent),
        "stolen": (found.stolen, percent),
        "stopped by the quota": (found.throttled_s, seconds),
        "fixed work": (found.probe_s, seconds),
    }
    said = {name: "–" if value is None else write(value) for name, (value, write) in shown.items()}
    return {"run": f"{found.moment}, {found.at}"} | said


@cache
def _environment() -> Environment:
    folder = resources.files("sasa_bench.report") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": code, "as_json": as_json}
    return environment
