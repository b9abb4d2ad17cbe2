"""What the arms of a gate are made from: revisions, folders and kernel files, in repositories as people have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkouts import PACKAGE, checkout

import sasa_bench
from sasa_bench.case import Case
from sasa_bench.cli import main
from sasa_bench.gate.arms import INSTALLED, Arm, set_up, verify
from sasa_bench.gate.git import GitError, Repository, find
from sasa_bench.gate.pairs import Point, exact_rows, survey
from sasa_bench.gate.sources import ArmError, merge_base, resolve, untracked

KERNEL = "from helper import FACTOR\n"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel author's repository with two commits, the second of which changes what the kernel imports."""
    folder = tmp_path / "kernels"
    (folder / "src").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    (folder / "src/kern.py").write_text(KERNEL)
    (folder / "src/helper.py").write_text("FACTOR = 1\n")
    (folder / ".gitignore").write_text("*.bin\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    (folder / "src/helper.py").write_text("FACTOR = 2\n")
    git(folder, "commit", "-qam", "two")
    monkeypatch.chdir(folder)
    return folder


def arms_of(tmp_path: Path, base: str, head: str, kernel: str = "src/kern.py") -> list[Arm]:
    return set_up(base, head, tmp_path / "out", impls=["unfold", kernel])


def test_two_revisions_of_a_kernel_file_run_under_the_sasa_bench_at_hand(repository: Path, tmp_path: Path) -> None:
    base, head, copy = arms_of(tmp_path, "HEAD~1", ".")
    for arm in (base, head, copy):
        assert [path.resolve() for path in arm.package_folder.iterdir()] == [INSTALLED]
    factors = [Path(arm.impl("src/kern.py")).with_name("helper.py").read_text() for arm in (base, head, copy)]
    assert factors == ["FACTOR = 1\n", "FACTOR = 2\n", "FACTOR = 1\n"]
    digests = [arm.kernels["src/kern.py"].digest for arm in (base, head, copy)]
    assert digests[0] == digests[2] != digests[1]
    assert base.commit == git(repository, "rev-parse", "HEAD~1")
    assert base.impl("unfold") == "unfold"


def test_a_dirty_tree_is_compared_as_it_stands_without_what_git_ignores(repository: Path, tmp_path: Path) -> None:
    (repository / "src/helper.py").write_text("FACTOR = 3\n")
    (repository / "src/extra.py").write_text("x = 1\n")
    (repository / "src/large.bin").write_text("ignored")
    _, head, _ = arms_of(tmp_path, "HEAD", ".")
    folder = Path(head.impl("src/kern.py")).parent
    assert (folder / "helper.py").read_text() == "FACTOR = 3\n"
    assert sorted(path.name for path in folder.iterdir()) == ["extra.py", "helper.py", "kern.py"]


def test_an_arm_knows_whether_it_is_a_commit(repository: Path, tmp_path: Path) -> None:
    assert [arm.uncommitted for arm in arms_of(tmp_path, "HEAD~1", ".")] == [False, False, False]
    (repository / "src/large.bin").write_text("ignored")
    assert not arms_of(tmp_path, "HEAD~1", ".")[1].uncommitted
    (repository / "src/extra.py").write_text("x = 1\n")
    assert [arm.uncommitted for arm in arms_of(tmp_path, "HEAD~1", ".")] == [False, True, False]


@pytest.mark.parametrize("where", [".", "src", "away"])
def test_a_kernel_and_a_suite_are_meant_from_the_folder_of_the_caller(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An absolute path too: base has the file where head has it, whatever kind of source either is."""
    folder = {".": repository, "src": repository / "src", "away": tmp_path}[where]
    monkeypatch.chdir(folder)
    shutil.copytree(repository, tmp_path / "old", ignore=shutil.ignore_patterns(".git"))
    (tmp_path / "old/src/helper.py").write_text("FACTOR = 0\n")
    kernel = repository / "src/kern.py"
    for words in (str(kernel), os.path.relpath(kernel, folder)):
        arms = arms_of(tmp_path, str(tmp_path / "old"), str(repository), words)
        factors = [Path(arm.impl(words)).with_name("helper.py").read_text() for arm in arms]
        assert factors == ["FACTOR = 0\n", "FACTOR = 2\n", "FACTOR = 0\n"]
    if folder != tmp_path:
        arms = arms_of(tmp_path, "HEAD~1", str(repository), os.path.relpath(kernel, folder))
        assert arms[0].kernels != arms[1].kernels


def test_a_file_of_any_kind_beside_a_kernel_is_part_of_what_it_is(repository: Path, tmp_path: Path) -> None:
    (repository / "src/csrc").mkdir()
    (repository / "src/csrc/kern.cu").write_text("// new\n")
    base, head, _ = arms_of(tmp_path, "HEAD", ".")
    assert base.kernels["src/kern.py"].digest != head.kernels["src/kern.py"].digest


@pytest.mark.parametrize("tracked", [True, False])
def test_copies_and_traces_of_earlier_gates_are_not_copied(repository: Path, tracked: bool) -> None:
    if not tracked:
        shutil.rmtree(repository / ".git")
    base = "HEAD" if tracked else "../old"
    shutil.copytree(repository, repository.parent / "old")
    shutil.copy(repository / "src/kern.py", repository / "kern.py")
    for number in range(2):
        _, head, _ = set_up(base, ".", repository / f"reports/gate-{number}", impls=["kern.py"])
        untracked(repository / f"reports/gate-{number}/profiles").joinpath("trace.json").touch()
    copied = Path(head.impl("kern.py")).parent
    assert (copied / "src/helper.py").is_file()
    assert not list(copied.rglob("arms"))
    assert not list(copied.rglob("trace.json"))


def test_a_kernel_file_without_its_ending_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ArmError, match=r"'kern' is no file, 'HEAD' has no sasa_bench/ to check out: .* --impl FILE.py"):
        set_up("HEAD", ".", tmp_path / "out", impls=["kern", "unfold"])


def test_two_environments_need_no_kernel_file(repository: Path, tmp_path: Path) -> None:
    """Each arm gets the sasa-bench at hand and nothing else of the environment that runs the gate."""
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    base, head, copy = set_up(".", ".", tmp_path / "out", base_python=str(link), impls=["unfold"])
    assert [arm.python for arm in (base, head, copy)] == [str(link), sys.executable, str(link)]
    loaded, unknown = survey(head, ["unfold"], 60.0)
    assert (Path(loaded["folder"]), unknown) == (INSTALLED, {})
    with pytest.raises(ArmError, match="nothing to compare"):
        set_up(".", ".", tmp_path / "out", impls=["unfold"])


def test_a_kernel_that_only_head_has_is_no_error_and_one_that_neither_has_is(repository: Path, tmp_path: Path) -> None:
    (repository / "src/new.py").write_text(KERNEL)
    base, head, _ = arms_of(tmp_path, "HEAD", ".", "src/new.py")
    assert (base.kernels["src/new.py"].digest, bool(head.kernels["src/new.py"].digest)) == ("", True)
    with pytest.raises(ArmError, match=r"src/none\.py is in neither 'HEAD' nor '\.'"):
        arms_of(tmp_path, "HEAD", ".", "src/none.py")


def test_a_repository_without_sasa_bench_needs_a_kernel_file(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ArmError, match=r"--impl FILE\.py"):
        set_up("HEAD~1", "HEAD", tmp_path / "out", impls=["unfold"])


def test_a_branch_named_like_a_folder_is_the_branch(repository: Path, tmp_path: Path) -> None:
    git(repository, "branch", "src", "HEAD~1")
    assert resolve("src").commit == git(repository, "rev-parse", "HEAD~1")
    assert resolve("./src").folder == repository / "src"


def test_a_hook_that_sets_git_dir_changes_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    base, _, _ = arms_of(tmp_path, "HEAD~1", "HEAD")
    assert Path(base.impl("src/kern.py")).is_file()


def test_a_worktree_and_a_submodule_are_repositories(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(repository, "worktree", "add", "-q", str(tmp_path / "tree"), "HEAD~1")
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "submodule", "--quiet", "add", str(repository), "inner")
    for folder in (tmp_path / "tree", outer / "inner"):
        monkeypatch.chdir(folder)
        base, _, _ = arms_of(tmp_path, git(repository, "rev-parse", "HEAD~1"), git(repository, "rev-parse", "HEAD"))
        assert Path(base.impl("src/kern.py")).is_file()


def test_a_shallow_clone_says_that_history_is_missing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(repository, "checkout", "-q", "-b", "topic", "HEAD~1")
    git(repository, "commit", "-q", "--allow-empty", "-m", "three")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", "--no-single-branch", repository.as_uri(), str(clone))
    monkeypatch.chdir(clone)
    found = find(clone)
    assert found is not None
    with pytest.raises(GitError, match=r"shallow.*fetch --unshallow"):
        found.merge_base("origin/main", "HEAD")
    with pytest.raises(ArmError, match="shallow: fetch more history"):
        resolve("HEAD~1")


def test_the_merge_base_is_found_where_there_is_one(repository: Path) -> None:
    git(repository, "branch", "topic", "HEAD~1")
    found = find(repository)
    assert found is not None
    assert found.merge_base("main", "topic") == git(repository, "rev-parse", "topic")
    # On main, a topic is compared with where it left main, and the working tree with its own last commit.
    git(repository, "commit", "--allow-empty", "-qm", "later on main")
    assert merge_base("main", "topic") == git(repository, "rev-parse", "topic")
    assert merge_base("main", ".") == git(repository, "rev-parse", "main")
    git(repository, "worktree", "add", "-q", "../tree", "topic")
    assert merge_base("main", "../tree") == git(repository, "rev-parse", "topic")


def test_a_commit_with_a_link_to_elsewhere_is_checked_out_with_it(repository: Path, tmp_path: Path) -> None:
    (repository / "src/data").symlink_to("/no/such/folder")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "link")
    base, _, _ = arms_of(tmp_path, "HEAD", ".")
    assert Path(base.impl("src/kern.py")).with_name("data").readlink() == Path("/no/such/folder")


def test_a_kernel_beside_a_link_to_another_folder_elsewhere_is_another_kernel(repository: Path, tmp_path: Path) -> None:
    for version in ("1.0", "2.0"):
        (tmp_path / version).mkdir()
        (repository / "src/csrc").unlink(missing_ok=True)
        (repository / "src/csrc").symlink_to(tmp_path / version)
        git(repository, "add", ".")
        git(repository, "commit", "-qm", version)
    base, head, copy = (arm.kernels["src/kern.py"].digest for arm in arms_of(tmp_path, "HEAD~1", "HEAD"))
    assert base == copy != head


@pytest.mark.parametrize("head", [".", "HEAD"])
def test_links_beside_a_kernel_lead_to_the_files_of_the_same_revision(
    repository: Path, tmp_path: Path, head: str
) -> None:
    (repository / "library/csrc").mkdir(parents=True)
    (repository / "library/csrc/a.h").write_text("one\n")
    (repository / "library/common.py").write_text("X = 1\n")
    (repository / "src/common.py").symlink_to("../library/common.py")
    (repository / "src/csrc").symlink_to("../library/csrc")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "links")
    (repository / "library/csrc/a.h").write_text("two\n")
    (repository / "library/common.py").write_text("X = 2\n")
    git(repository, "commit", "-qam", "behind them")
    (repository / "src/again.h").symlink_to("csrc/a.h")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "--amend", "--no-edit")
    folders = [Path(arm.impl("src/kern.py")).parent for arm in arms_of(tmp_path, "HEAD~1", head)]
    assert (folders[1] / "again.h").read_text() == "two\n"
    assert [(folder / "common.py").read_text() for folder in folders] == ["X = 1\n", "X = 2\n", "X = 1\n"]
    assert [(folder / "csrc/a.h").read_text() for folder in folders] == ["one\n", "two\n", "one\n"]
    digests = [arm.kernels["src/kern.py"].digest for arm in arms_of(tmp_path, "HEAD~1", head)]
    assert digests[0] == digests[2] != digests[1]


def test_a_kernel_that_is_a_link_is_that_of_each_revision(repository: Path, tmp_path: Path) -> None:
    for version in (1, 2):
        (repository / f"src/v{version}.py").write_text(f"VERSION = {version}\n")
    (repository / "src/kern.py").unlink()
    (repository / "src/kern.py").symlink_to("v1.py")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "v1")
    (repository / "src/kern.py").unlink()
    (repository / "src/kern.py").symlink_to("v2.py")
    git(repository, "commit", "-qam", "v2")
    base, head, _ = arms_of(tmp_path, "HEAD~1", ".")
    assert [Path(arm.impl("src/kern.py")).read_text() for arm in (base, head)] == ["VERSION = 1\n", "VERSION = 2\n"]


@pytest.mark.parametrize("head", [".", "HEAD"])
def test_a_kernel_that_leads_to_another_folder_brings_what_lies_beside_the_file(
    repository: Path, tmp_path: Path, head: str
) -> None:
    (repository / "entry").mkdir()
    (repository / "entry/kern.py").symlink_to("../src/kern.py")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "an entry")
    base, new, _ = arms_of(tmp_path, "HEAD~1", head, "entry/kern.py")
    assert not Path(base.impl("entry/kern.py")).exists()
    assert Path(new.impl("entry/kern.py")).with_name("helper.py").read_text() == "FACTOR = 2\n"


def test_folders_outside_of_git_share_what_their_links_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("old", "new"):
        (tmp_path / version / "k/deep").mkdir(parents=True)
        (tmp_path / version / "library").mkdir()
        (tmp_path / version / "library/common.py").write_text(f"# {version}\n")
        (tmp_path / version / "k/common.py").symlink_to("../library/common.py")
        (tmp_path / version / "k/csrc").symlink_to("../library")
        for name in ("a.py", "b.py", "deep/c.py"):
            (tmp_path / version / "k" / name).write_text("IMPL = None\n")
    monkeypatch.chdir(tmp_path)
    kernels = ["k/a.py", "k/b.py", "k/deep/c.py"]
    arms = set_up("./old", "./new", tmp_path / "out", impls=kernels)
    for arm, version in zip(arms, ("old", "new", "old"), strict=True):
        folder = Path(arm.impl("k/a.py")).parent
        assert (folder / "common.py").read_text() == (folder / "csrc/common.py").read_text() == f"# {version}\n"
        assert all(Path(arm.impl(kernel)).is_file() for kernel in kernels)
    # A link that leads out of the folder that was given.
    arms = set_up("./old/k", "./new/k", tmp_path / "out", impls=["a.py"])
    assert [Path(arm.impl("a.py")).with_name("common.py").read_text() for arm in arms[:2]] == ["# old\n", "# new\n"]


def test_a_suite_that_is_a_link_is_read_from_a_commit(repository: Path) -> None:
    (repository / "suites").mkdir()
    (repository / "suites/mine.toml").write_text("title = 'mine'\n")
    (repository / "mine.toml").symlink_to("suites/mine.toml")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "suite")
    assert resolve("HEAD").read("mine.toml") == resolve(".").read("mine.toml") == "title = 'mine'\n"
    assert resolve("HEAD").read("none.toml") is None


def test_what_git_leaves_out_of_archives_is_part_of_an_arm(repository: Path, tmp_path: Path) -> None:
    (repository / ".gitattributes").write_text("src/ export-ignore\n")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "attributes")
    base, head, _ = arms_of(tmp_path, "HEAD~1", "HEAD")
    assert all(Path(arm.impl("src/kern.py")).is_file() for arm in (base, head))


@pytest.mark.parametrize("absolute", [True, False])
def test_a_kernel_outside_of_both_revisions_would_be_compared_with_itself(
    repository: Path, tmp_path: Path, absolute: bool
) -> None:
    (tmp_path / "kern.py").write_text("IMPL = None\n")
    with pytest.raises(ArmError, match=r"kern\.py lies in neither 'HEAD~1' nor '\.'"):
        arms_of(tmp_path, "HEAD~1", ".", str(tmp_path / "kern.py") if absolute else "../kern.py")


def test_a_suite_that_is_not_utf_8_is_named(repository: Path) -> None:
    (repository / "mine.toml").write_bytes('title = "d\xe9j\xe0"\n'.encode("latin-1"))
    with pytest.raises(ArmError, match=r"mine\.toml of '\.' is not UTF-8"):
        resolve(".").read("mine.toml")


def test_the_checkout_of_another_owner_is_refused_in_the_words_of_git(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another owner")
    for path in (repository, repository / ".git"):
        os.chown(path, 12345, 12345)
    monkeypatch.chdir(repository / "src")
    with pytest.raises(GitError, match=rf"dubious ownership.*safe\.directory {repository}$"):
        resolve("HEAD")
    for name, value in (("COUNT", "1"), ("KEY_0", "safe.directory"), ("VALUE_0", str(repository))):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    assert resolve("HEAD").commit


def test_outside_of_any_repository_a_revision_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(tmp_path) is None
    with pytest.raises(ArmError, match="there is none here"):
        resolve("main")


def test_a_relative_python_is_taken_from_the_folder_of_the_caller(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin/python"
    link.symlink_to(sys.executable)
    relative = os.path.relpath(link, repository)
    base, head, _ = set_up("HEAD", "HEAD", tmp_path / "out", base_python=relative, impls=["src/kern.py"])
    assert (base.python, head.python) == (str(repository / relative), sys.executable)
    with pytest.raises(ArmError, match="no/such/python is not a Python interpreter"):
        set_up("HEAD", ".", tmp_path / "out", head_python="no/such/python", impls=["src/kern.py"])


def test_an_arm_that_does_not_run_is_named_with_its_python(repository: Path, tmp_path: Path) -> None:
    base = replace(arms_of(tmp_path, "HEAD~1", ".")[0], python=shutil.which("true") or "")
    with pytest.raises(ArmError, match=rf"the base arm does not run \({base.python} in .*: the worker ended with exit"):
        survey(base, [], 60.0)


def test_an_arm_reads_back_as_it_was_written(repository: Path, tmp_path: Path) -> None:
    for arm in arms_of(tmp_path, "HEAD~1", "."):
        assert Arm.from_dict(arm.to_dict()) == arm


def test_a_checkout_of_sasa_bench_runs_its_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(sasa_bench.__file__).parent
    for name in ("a", "b"):
        shutil.copytree(package, tmp_path / name / "sasa_bench", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    base, head, _ = set_up("a", "b", tmp_path / "out")
    assert base.package_folder == tmp_path / "out/arms/base"
    assert (head.package_folder / "sasa_bench/__init__.py").is_file()


def test_commits_between_two_ends_come_oldest_first(repository: Path) -> None:
    found = find(repository)
    assert isinstance(found, Repository)
    assert found.between("HEAD~1", "HEAD") == [git(repository, "rev-parse", "HEAD")]
    with pytest.raises(GitError, match="is not an ancestor"):
        found.between("HEAD", "HEAD~1")


def test_each_arm_loads_its_own_revision_of_the_kernel_and_what_it_imports(repository: Path, tmp_path: Path) -> None:
    kernel = (
        "from dataclasses import replace\nfrom helper import FACTOR\nfrom sasa_bench.impls import get\n"
        "naive = get('naive')\n\n\ndef build(case, tensors):\n    call = naive.build(case, tensors)\n"
        "    return lambda: FACTOR * call()\n\n\nIMPL = replace(naive, name='kern', build=build)\n"
    )
    (repository / "src/kern.py").write_text(kernel)
    git(repository, "commit", "-qam", "three")
    (repository / "src/helper.py").write_text("FACTOR = 1\n")
    arms = arms_of(tmp_path, "HEAD", ".")
    point = Point("src/kern.py", Case(channels=8, heads=2, kernel_size=3, resolution=6, batch=1, threads=1))
    rows = [found[point.key] for found in exact_rows(arms[:2], [point], 60.0).values()]
    assert [row["status"] for row in rows] == ["wrong", "ok"], rows
    loaded, unknown = survey(arms[1], ["src/kern.py", "kernel_that_is_not_there"], 60.0)
    assert list(unknown) == ["kernel_that_is_not_there"]
    assert loaded["kernels"]["src/kern.py"]["digest"] == arms[1].kernels["src/kern.py"].digest
    assert loaded["commit"] == git(repository, "rev-parse", "HEAD")


def test_the_same_folder_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / "a")
    with pytest.raises(SystemExit) as stop:
        main(["gate", "--base", str(folder), "--head", f"{folder}/../a", "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    assert "nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["no-such-revision", "."])
def test_an_arm_that_is_no_checkout_is_refused(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArmError):
        set_up(str(checkout(tmp_path / "a")), source, tmp_path / "out")


def test_an_arm_that_loads_another_package_is_refused(tmp_path: Path) -> None:
    arm = Arm("head", tmp_path, "h", sys.executable)
    with pytest.raises(ArmError, match="instead of"):
        verify(arm, {"folder": str(PACKAGE)})


def test_a_revision_is_checked_out_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = checkout(tmp_path / "repo")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(repo, *command)
    (repo / "sasa_bench/extra.py").write_text("x = 1\n")
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "two")
    monkeypatch.chdir(repo)
    base, head, copy = set_up("HEAD~1", "HEAD", tmp_path / "out")
    assert not (base.folder / "sasa_bench/extra.py").exists()
    assert (head.folder / "sasa_bench/extra.py").exists()
    assert not (copy.folder / "sasa_bench/extra.py").exists()
    assert copy.exports == base.exports != head.exports
