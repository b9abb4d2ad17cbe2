"""`sasa-bench new`: a file to start a kernel of one's own from."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from sasa_bench.case import UserError
from sasa_bench.impls import names

TEMPLATE, NAME = "template.py", "my_kernel"


def write(path: Path) -> None:
    """Write a kernel that runs as it is, named after the file.

    Raises UserError for a path that exists, is no .py file in an existing folder, or has the name of an implementation.
    """
    if path.suffix != ".py" or not re.fullmatch(r"[A-Za-z]\w*", path.stem, re.ASCII):
        raise UserError(f"{path}: give a .py file named by letters, digits and underscores, such as {NAME}.py")
    if path.stem in names():
        raise UserError(f"{path}: {path.stem!r} is already an implementation; choose another name")
    text = resources.files("sasa_bench.impls").joinpath(TEMPLATE).read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace(NAME, path.stem))
    except FileExistsError:
        raise UserError(f"{path} already exists and was not changed; give another name") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
