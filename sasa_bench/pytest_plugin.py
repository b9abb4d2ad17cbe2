"""Suites as benchmarks of pytest: one test for each case and implementation of a suite file.

Needs pytest-benchmark or pytest-codspeed, which give the fixture `benchmark`. `pytest FILE.toml` runs a suite wherever
it lies. The suites of a folder are left alone unless two lines in a conftest.py beside them ask for it,

    from sasa_bench.pytest_plugin import pytest_addoption, pytest_collect_file
    __all__ = ["pytest_addoption", "pytest_collect_file"]

or `pytest -p sasa_bench.pytest_plugin FOLDER` does. Everything runs in the process of pytest: a kernel that crashes
ends it, and the allocator and OpenMP are set as the environment says.
"""

from __future__ import annotations

import ast
import os
import random
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sasa_bench.case import Case
    from sasa_bench.results.machine import Machine
    from sasa_bench.suite import Suite
    from sasa_bench.timing.prepared import References

FIXTURE_PLUGINS = ("benchmark", "codspeed")
"""The plug-ins that give the fixture `benchmark`, as pytest knows them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --impl, unless another folder of suites did so."""
    group = parser.getgroup("sasa-bench")
    if not any("--impl" in option.names() for option in group.options):
        group.addoption(
            "--impl", action="append", metavar="NAME|FILE.py", help="Measure suites with this instead; repeatable."
        )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SuiteFile | None:
    """A collector for a suite file that was asked for; None for any other."""
    if file_path.suffix != ".toml":
        return None
    config = parent.config
    # The entry point and a conftest.py may both offer the file.
    collected = config.stash.setdefault(_COLLECTED, set())
    if file_path in collected or not (_named(config, file_path) or (_opted_in(config) and _is_suite(file_path))):
        return None
    collected.add(file_path)
    return SuiteFile.from_parent(parent, path=file_path)


_COLLECTED = pytest.StashKey[set[Path]]()


def _named(config: pytest.Config, path: Path) -> bool:
    """Whether the command line names this file, or a test in it."""
    here = config.invocation_params.dir
    return any((here / str(word).partition("::")[0]).resolve() == path.resolve() for word in config.args)


def _opted_in(config: pytest.Config) -> bool:
    """Whether -p or a conftest.py turned the plug-in on, rather than that it is installed."""
    if __name__ in (config.getoption("plugins", None) or ()):
        return True
    others = (p for p in config.pluginmanager.get_plugins() if getattr(p, "__name__", "") != __name__)
    return any(getattr(plugin, "pytest_collect_file", None) is pytest_collect_file for plugin in others)


def _is_suite(path: Path) -> bool:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True  # a suite that does not parse should say so
    return "impls" in data or "axes" in data


class SuiteFile(pytest.File):
    """A suite file: its tests are its cases, each with every implementation.

    `references` holds what is expected of `case`, the one that was run last.
    """

    case: Case | None = None
    references: References

    def references_of(self, case: Case) -> References:
        """What is expected of a case so far; that of any other is forgotten."""
        if case != self.case:
            self.case, self.references = case, {}
        return self.references

    def collect(self) -> Iterator[SuiteTest]:
        """The tests of the file, those of one case beside each other."""
        from sasa_bench.case import UserError
        from sasa_bench.results.environment import require_free_threads
        from sasa_bench.suite import load
        from sasa_bench.sweep.plan import require_distinct

        if not any(self.config.pluginmanager.hasplugin(name) for name in FIXTURE_PLUGINS):
            raise self.CollectError("suites need the fixture `benchmark`: pip install pytest-benchmark")
        try:
            require_free_threads(os.environ)
            suite = load(self.path)
            specs = dict.fromkeys(self.config.getoption("impl", None) or suite.impls)
            require_distinct({spec: _name_of(spec) for spec in specs})
        except UserError as error:
            raise self.CollectError(str(error)) from None
        for case in suite.cases:
            swept = "-".join(f"{axis}={getattr(case, axis)}" for axis in suite.axes) or "one"
            for impl in specs:
                test = _test(self, suite, case, impl)
                yield SuiteTest.from_parent(self, name=f"{_name_of(impl)}[{swept}]", callobj=test)


@cache
def _name_of(spec: str) -> str:
    """The name of an implementation as tables have it; that of a file is read, where it stands there, not run."""
    if not spec.endswith(".py"):
        return spec
    try:
        tree = ast.parse(Path(spec).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return Path(spec).stem  # the test says what is wrong with the file
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "IMPL" and isinstance(node.value, ast.Call):
            given = [word.value for word in node.value.keywords if word.arg == "name"] + node.value.args[:1]
            for value in given:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    return value.value
    from sasa_bench import impls

    try:
        return impls.get(spec).name
    except impls.UnknownImplError:
        return Path(spec).stem


class SuiteTest(pytest.Function):
    """One case and implementation."""

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test comes from: the suite file."""
        return self.path, 0, self.name


def _test(file: SuiteFile, suite: Suite, case: Case, spec: str) -> Callable[[Any], None]:
    def measured(benchmark: Any) -> None:
        from sasa_bench import impls
        from sasa_bench.results.pytest_benchmark import extra_info
        from sasa_bench.results.record import Record
        from sasa_bench.timing import switches
        from sasa_bench.timing.memory import peak_memory
        from sasa_bench.timing.prepared import prepare
        from sasa_bench.timing.probe import available_cores

        resolved = case if case.threads else case.with_(threads=available_cores())
        impl = impls.get(spec)
        with _threads(resolved.threads):
            switched = switches.apply(resolved)
            seed = random.SystemRandom().randrange(1 << 31)
            prepared = prepare(spec, resolved, seed, lambda stage: None, file.references_of(resolved))
            reason = f"{prepared.row['status']}: {prepared.row['reason']}"
            if prepared.row["status"] == "skipped":
                pytest.skip(reason)
            if prepared.step is None:
                pytest.fail(reason, pytrace=False)
            peak, peak_source = peak_memory(prepared.step, resolved.device)
            if hasattr(benchmark, "extra_info"):
                machine = _machine()
                source = impls.source(spec)
                about = replace(impls.info(impl), digest=source.get("digest", ""), commit=source.get("commit", ""))
                own = {"extra": prepared.row.get("extra", {}) | switched | about.source}
                row = Record(
                    suite=suite.name,
                    impl=impl.name,
                    op=impl.op.name,
                    case=resolved,
                    started_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    **prepared.row | {"peak_memory_bytes": peak, "memory_source": peak_source} | own,
                )
                benchmark.extra_info.update(extra_info(row.to_dict(), asdict(about), machine))
                benchmark.group = f"{suite.name}: {case.describe()}"
            benchmark(_to_its_end(prepared.step, resolved.device))

    return measured


def _to_its_end(step: Callable[[], object], device: str) -> Callable[[], object]:
    if device != "cuda":
        return step
    import torch

    def waited() -> object:
        result = step()
        torch.cuda.synchronize()
        return result

    return waited


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _machine() -> Machine:
    from sasa_bench.results.environment import recorded
    from sasa_bench.timing.probe import detect

    return replace(detect(), environment=recorded(os.environ))
