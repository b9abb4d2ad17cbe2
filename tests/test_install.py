"""Setting up: what a user reads where it cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[1] / ".ci" / "install"

# pip asks it for the dependencies of the project; it needs no package that pip would have to fetch.
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_editable(folder, settings=None):
    info = Path(folder) / "sasa_bench-0.1.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\\nName: sasa-bench\\nVersion: 0.1\\nProvides-Extra: dev\\n"
        "Requires-Dist: kernels; extra == 'dev'\\n"
    )
    return info.name

def build_editable(folder, settings=None, metadata=None):
    raise AssertionError("nothing is built")
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    requires = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own around .ci/install; its environment has the pip of this one, which installs nothing."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(INSTALL, tmp_path / ".ci")
    (tmp_path / ".ci" / "no-deps.txt").touch()
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tmp_path / "wheels").mkdir()
    script(tmp_path / "venv" / "bin" / "pip", f'exec {sys.executable} -m pip "$@" --dry-run')
    return tmp_path


def install(project: Path, python: str | Path, constraints: str = "") -> subprocess.CompletedProcess[str]:
    (project / ".ci" / "constraints.txt").write_text(constraints)
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    command = [project / ".ci" / "install", str(python), "venv", "dev"]
    return subprocess.run(command, env=alone | settings, capture_output=True, text=True, timeout=120)


def test_an_old_python_is_one_sentence(project: Path) -> None:
    old = script(
        project / "python3.10", f'shift; exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 4); $1"'
    )
    done = install(project, old)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"sasa-bench needs Python 3.11 or newer, and {old} is 3.10.4: give another one, make ... PYTHON=python3.12\n"
    )


def test_a_python_that_is_not_there_is_one_sentence(project: Path) -> None:
    done = install(project, "python0")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        ["python0 does not run: give another one, make ... PYTHON=python3.12"],
    )


def test_versions_that_contradict_each_other_are_one_sentence(project: Path) -> None:
    wheel(project / "wheels", "kernels", "1.0", needs="compiler>=2")
    wheel(project / "wheels", "compiler", "1.0")
    wheel(project / "wheels", "compiler", "2.0")
    done = install(project, sys.executable, "compiler==1.0\n")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("pip finds no versions for sasa-bench[dev] that fit together (")
    assert "kernels 1.0 depends on compiler>=2" in line
    assert "compiler==1.0" in line
    assert "make lock" in line
    assert "ResolutionImpossible" in (project / "venv" / "install.log").read_text()


def test_a_package_that_cannot_be_had_is_one_sentence(project: Path) -> None:
    done = install(project, sys.executable)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("pip cannot install sasa-bench[dev] (ERROR: No matching distribution found for kernels")
    assert "check the network" in line


def test_what_fits_is_installed(project: Path) -> None:
    wheel(project / "wheels", "kernels", "1.0", needs="compiler>=2")
    wheel(project / "wheels", "compiler", "2.0")
    wheel(project / "wheels", "amd_quark", "1.0")
    done = install(project, sys.executable, "compiler==2.0\n")
    assert (done.returncode, done.stderr) == (0, "")
