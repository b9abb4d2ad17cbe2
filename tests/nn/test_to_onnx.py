"""export(): a module as an ONNX file that computes what the module does, or a sentence and no file."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path

import matrix
import pytest
import torch
import torch.onnx.errors
from click.testing import CliRunner
from torch import nn

import sasa_bench
from sasa_bench import impls
from sasa_bench.cli import cli
from sasa_bench.networks.stem import AttentionStem
from sasa_bench.nn import ExportError, saved_types, to_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def model() -> nn.Module:
    layer = sasa_bench.LocalAttention2d(8, kernel_size=3, heads=2, impl="fused", bias=True, proj=True, stride=2)
    return nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU(inplace=True)).eval()


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_a_trained_module_is_exported_whatever_runs_it_here(tmp_path: Path) -> None:
    trained, x = model(), torch.randn(2, 8, 7, 6)
    made = sasa_bench.export(trained, x, tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(run(made.path, x), trained(x), rtol=1e-4, atol=1e-5)
    assert made.max_abs_err <= made.err_budget
    assert made.model_bytes == made.path.stat().st_size
    assert not made.library
    assert trained[0].impl == "fused"
    assert list(tmp_path.iterdir()) == [made.path]


def test_a_file_of_open_sizes_serves_them_all(tmp_path: Path) -> None:
    layer = sasa_bench.LocalAttention2d(8, kernel_size=(3, 5), heads=2)
    made = sasa_bench.export(layer, torch.randn(1, 8, 8, 8), tmp_path / "m.onnx", dynamic=True)
    with torch.no_grad():
        for shape in ((1, 8, 1, 1), (3, 8, 4, 12), (2, 8, 9, 5)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(made.path, x), layer(x), rtol=1e-4, atol=1e-5)


class Stems(nn.Module):
    """A stem of each kind, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(
            AttentionStem(3, 16, kind) for kind in ("stand_alone", "conv_values", "aware_values")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([stem(x) for stem in self.stems], 1)


def test_a_file_of_open_sizes_with_attention_stems_serves_sizes_that_blocks_do_not_divide(tmp_path: Path) -> None:
    network = nn.Sequential(Stems(), sasa_bench.LocalAttention2d(48, kernel_size=3, heads=2)).eval()
    made = sasa_bench.export(network, torch.randn(1, 3, 12, 16), tmp_path / "m.onnx", dynamic=True)
    with torch.no_grad():
        for height, width in ((12, 16), (13, 16), (8, 11), (7, 18), (4, 4), (3, 5)):
            x = torch.randn(2, 3, height, width)
            torch.testing.assert_close(run(made.path, x), network(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"contains no LocalAttention2d: torch.onnx.export suits it"):
        sasa_bench.export(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 5, 5), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"give images \[B, C, H, W\], float32 or float16"):
        sasa_bench.export(model(), torch.randn(1, 8, 5, 5).double(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = to_onnx._run
    monkeypatch.setattr(to_onnx, "_run", lambda *given: [y + 1e-3 for y in right(*given)])
    with pytest.raises(ExportError, match=r"would differ from the module by 1.0\de-03"):
        sasa_bench.export(model(), torch.randn(1, 8, 5, 5), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_takes_a_saved_module_and_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def export(module: nn.Module, example: torch.Tensor, path: Path, **options: bool) -> to_onnx.Exported:
        called.append((type(module), list(example.shape), options))
        return to_onnx.Exported(path, "onnx", 3, 100, 1e-7, 1e-6, "")

    monkeypatch.setattr(sasa_bench, "export", export, raising=False)
    monkeypatch.chdir(tmp_path)
    layer = sasa_bench.LocalAttention2d(8, kernel_size=3, heads=2)
    torch.save(layer, "layer.pt")
    Path("of_mine.py").write_text("import sasa_bench\n\ndef make():\n    return sasa_bench.network('resnet26')\n")
    said = CliRunner().invoke(cli, ["export", "layer.pt", "--out", "a.onnx", "--dynamic"])
    assert said.exit_code == 0, said.output
    assert "attention as onnx" in said.output
    said = CliRunner().invoke(cli, ["export", "of_mine:make", "--out", "b.onnx", "--shape", "2x3x64x64"])
    assert said.exit_code == 0, said.output
    assert called == [
        (type(layer), [1, 8, 28, 28], {"dynamic": True, "library": False}),
        (nn.Sequential, [2, 3, 64, 64], {"dynamic": False, "library": False}),
    ]


def test_a_saved_network_with_any_stem_is_read_again(tmp_path: Path) -> None:
    for stem in ("conv", "stand_alone", "conv_values", "aware_values"):
        torch.save(sasa_bench.network("resnet26", stem, "4"), tmp_path / "m.pt")
        with torch.serialization.safe_globals(saved_types()):
            assert isinstance(torch.load(tmp_path / "m.pt"), nn.Module)


@pytest.mark.parametrize(
    ("source", "words"),
    [("none.pt", "No such file"), ("missing_module:make", "gives no module"), ("evil.pt", "--trust")],
)
def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"f": Path}, "evil.pt")
    said = CliRunner().invoke(cli, ["export", source, "--out", "m.onnx"])
    assert said.exit_code != 0
    assert words in said.output


def test_a_trusted_module_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    text = "import torch\n\nclass Own(torch.nn.Conv2d):\n    pass\n"
    Path("of_this_folder.py").write_text(text)
    torch.save(importlib.import_module("of_this_folder").Own(3, 4, 1), "m.pt")
    sys.modules.pop("of_this_folder")
    monkeypatch.setattr(sys, "path", sys.path[1:])
    command = ["export", "m.pt", "--trust", "--out", "m.onnx", "--shape", "1x3x8x8"]
    kept: list[nn.Module] = []

    def export(module: nn.Module, example: torch.Tensor, path: Path, **options: bool) -> to_onnx.Exported:
        kept.append(module)
        return to_onnx.Exported(path, "onnx", 3, 100, 1e-7, 1e-6, "")

    monkeypatch.setattr(sasa_bench, "export", export, raising=False)
    said = CliRunner().invoke(cli, command)
    assert (said.exit_code, type(kept[0]).__name__) == (0, "Own"), said.output
    sys.modules.pop("of_this_folder")
    Path("of_this_folder.py").unlink()
    said = CliRunner().invoke(cli, command)
    assert said.exit_code != 0
    assert "add --trust" not in said.output
    assert "call sasa_bench.export in the script that made it" in said.output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", matrix.names())
def test_the_legacy_exporter_traces_one_size_or_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    layer, x, file = matrix.make(name).eval(), torch.randn(matrix.SHAPE), io.BytesIO()
    core = None if name == "auto" else impls.get(name).core
    if core is not None and not core.portable:
        with pytest.raises(RuntimeError, match="has no ONNX operators: export with impl = 'auto'"):
            torch.onnx.export(layer, (x,), file, dynamo=False, opset_version=17)
        return
    if name == "blocked":  # its blocks are Tensor.unfold, which this exporter lacks for sizes that it does not know
        with pytest.raises(torch.onnx.errors.SymbolicValueError, match="operator Unfold"):
            torch.onnx.export(layer, (x,), file, dynamo=False, opset_version=17)
        return
    torch.onnx.export(layer, (x,), file, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    matrix.assert_right((torch.from_numpy(y),), x)


class Silent(nn.Module):
    """A layer whose output is nothing but zeros, as behind a norm that was initialised so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = sasa_bench.LocalAttention2d(8, kernel_size=3, heads=2)
        nn.init.zeros_(self.layer.w_qkv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


def test_a_module_whose_output_is_zero_is_exported(tmp_path: Path) -> None:
    made = sasa_bench.export(Silent(), torch.randn(1, 8, 5, 5), tmp_path / "m.onnx")
    assert (made.max_abs_err, made.err_budget) == (0, 0)


def test_an_output_that_is_not_a_number_at_the_other_size_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([(1e-9, 1e-6), (float("nan"), 1e-6)])
    monkeypatch.setattr(to_onnx, "_error", lambda *given: next(errors))
    with pytest.raises(ExportError, match="would differ from the module by nan"):
        sasa_bench.export(model(), torch.randn(1, 8, 9, 9), tmp_path / "m.onnx", dynamic=True)
    assert to_onnx._largest([torch.ones(2), torch.tensor([1.0, float("nan")])]) != 0


@pytest.mark.parametrize(
    ("module", "x", "words"),
    [
        (lambda: model(), torch.randn(1, 4, 5, 5), "does not run on the example"),
        (lambda: model().half(), torch.randn(1, 8, 5, 5), "in the dtype of its parameters"),
    ],
)
def test_an_example_that_the_module_does_not_take_is_one_sentence(  # type: ignore[no-untyped-def]
    module, x: torch.Tensor, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=words):
        sasa_bench.export(module(), x, tmp_path / "m.onnx")


def test_an_implementation_that_cannot_run_here_is_no_obstacle(tmp_path: Path) -> None:
    layer, x = sasa_bench.LocalAttention2d(8, kernel_size=3, heads=2, impl="triton"), torch.randn(1, 8, 5, 5)
    made = sasa_bench.export(layer, x.requires_grad_(), tmp_path / "m.onnx")
    layer.impl = "auto"
    torch.testing.assert_close(run(made.path, x.detach()), layer(x.detach()).detach(), rtol=1e-4, atol=1e-5)
