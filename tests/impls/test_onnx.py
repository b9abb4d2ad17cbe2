"""Exported graphs compute what the reference computes, count what the cost model counts, and say what is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sasa_bench import impls, ops
from sasa_bench.case import Case
from sasa_bench.cli import cli
from sasa_bench.ops.tensors import leaves, random_tensors
from sasa_bench.results.environment import KEEP_MODELS
from sasa_bench.results.file import read
from sasa_bench.timing.check import compare, compute_reference
from sasa_bench.timing.prepared import prepare

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from sasa_bench.impls import _attention, gathered, onnx_fused  # noqa: E402
from sasa_bench.impls import _onnx as shared  # noqa: E402
from sasa_bench.impls._onnx import session  # noqa: E402

LOCAL_ATTENTION = ops.get("local_attention")

EXPORTED = [name for name in impls.names() if name.startswith("onnx")]
SMALL = Case(channels=12, heads=3, kernel_size=5, resolution="7x9", threads=1)


def judged(name: str, case: Case) -> dict[str, object]:
    row = prepare(name, case, 5, lambda stage: None, {}).row
    if row["status"] == "skipped":
        pytest.skip(row["reason"])
    assert row["status"] == "ok", row["reason"]
    return row


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "core", "position": "none", "border": "zero"},
        {"position": "absolute", "border": "mask", "resolution": "17x9"},
        {"position": "relative", "border": "zero"},
        {"position": "relative", "kernel_size": 11, "resolution": "4x6"},
        {"position": "relative", "heads": 12, "batch": 1, "resolution": "1x5"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_the_formulation_to_export_agrees_with_the_reference(changes: dict[str, object]) -> None:
    judged("onnx", SMALL.with_(**changes))


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_implementation_names_the_one_in_pytorch_that_computes_the_same(name: str) -> None:
    file = impls.get(name)
    source = impls.get(file.info.exports)
    assert source.op is file.op
    assert not source.info.exports
    assert source.computes(SMALL) == file.computes(SMALL)
    assert impls.info(file).any_size == (name == "onnx_dynamic")
    assert impls.info(file).library == (name == "onnx_fused")


@pytest.mark.parametrize(("scope", "operator"), [("layer", "LocalAttentionLayer"), ("core", "LocalAttention")])
def test_the_native_kernel_is_the_only_node_of_its_file(scope: str, operator: str) -> None:
    case = SMALL.with_(scope=scope)
    tensors = leaves(random_tensors(LOCAL_ATTENTION, case, 3), case)
    make = impls.get("onnx_fused").ahead
    assert make is not None
    model, _ = make(case, tensors)
    assert [(node.domain, node.op_type) for node in model.graph.node] == [("sasa_bench", operator)]


def test_the_headers_are_found_in_the_package_that_contains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNXRUNTIME_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(_attention, "SYSTEM_FOLDERS", ())
    if find_spec("quark") is None:
        pytest.skip("amd-quark is not installed: `make setup` installs it")
    found = _attention.onnx_headers()
    assert found is not None
    assert (found / "onnxruntime_cxx_api.h").is_file()


@pytest.mark.parametrize("name", [name for name in EXPORTED if name not in ("onnx", "onnx_dynamic")])
def test_every_exported_implementation_has_its_figures(name: str) -> None:
    figures = judged(name, SMALL)["extra"]
    assert isinstance(figures, dict)
    for column in ("build_s", "export_s", "session_s", "model_bytes", "node_count", "optimised_node_count"):
        assert figures[column] > 0, column
    assert ("graph_flops" in figures) == (name != "onnx_fused")


def test_the_graph_of_the_unfolded_formulation_does_what_the_cost_model_counts() -> None:
    for position in ("relative", "absolute"):
        case = SMALL.with_(position=position)
        row = judged("onnx_unfold", case)
        assert row["extra"]["graph_flops"] == ops.get("local_attention").cost(case).flops  # type: ignore[index]


def test_the_graph_of_a_convolution_does_what_the_cost_model_counts() -> None:
    row = judged("onnx_conv3x3", SMALL)
    assert row["extra"]["graph_flops"] == row["flops"] == 2 * 9 * 12 * 12 * 2 * 7 * 9  # type: ignore[index]


def test_the_graph_of_the_gathered_formulation_multiplies_whole_halos() -> None:
    """3 x 5 blocks of 4 x 4 queries and 8 x 8 keys: two products over 4 channels, a mask once, what positions add.

    Positions: 8 rows and 8 columns of a halo for each query, a product over these 16 and a sum. And what Inf or NaN in
    a halo but not in the window take, for each scalar of the map.
    """
    case = SMALL.with_(scope="core", position="none", resolution="9x17")
    queries, scalars = 2 * 3 * 15 * 16, 2 * 12 * 9 * 17
    finite = 4 * scalars  # k * (v * 0) and its sum, added to y
    plain = queries * (64 * (2 * 4 + 2 * 4 + 1) + 1)  # masked weights times 0; how far logits are raised
    assert judged("onnx", case)["extra"]["graph_flops"] == plain + finite  # type: ignore[index]
    relative = judged("onnx", case.with_(position="relative"))
    places = queries * 16 * 2 * 4 + queries * 64 * (2 * 16 + 1)
    assert relative["extra"]["graph_flops"] == plain + places + finite  # type: ignore[index]


def test_the_graph_of_a_small_map_multiplies_all_keys() -> None:
    """63 queries and 63 keys. Positions: 7 rows and 9 columns, each over 2 channels, a product over these 16, a sum."""
    case = SMALL.with_(scope="core", position="relative")
    queries, scalars = 2 * 3 * 63, 2 * 12 * 63
    plain = queries * (63 * (2 * 4 + 2 * 4 + 1) + 1) + 4 * scalars
    expected = plain + queries * 16 * 2 * 2 + queries * 63 * (2 * 16 + 1)
    assert judged("onnx", case)["extra"]["graph_flops"] == expected  # type: ignore[index]


def test_the_graph_of_a_narrow_map_multiplies_bands_of_rows() -> None:
    """7 bands of 2 rows of 5 queries; their keys are the rows of both windows that are inside of the map."""
    case = SMALL.with_(scope="core", position="none", resolution="14x5")
    rows = sum(min(i + 4, 14) - max(i - 2, 0) for i in range(0, 14, 2))
    expected = 2 * 3 * (10 * rows * 5 * (2 * 4 + 2 * 4 + 1) + 14 * 5) + 4 * 2 * 12 * 14 * 5
    assert judged("onnx", case)["extra"]["graph_flops"] == expected  # type: ignore[index]


def test_one_dynamic_model_serves_every_size(tmp_path: Path) -> None:
    case = SMALL.with_(scope="core")
    function = shared.attention_function(case, gathered.EXPORTED, dynamic=True)
    tensors = random_tensors(LOCAL_ATTENTION, case, 1)
    model, figures = shared.export(function, case, leaves(tensors, case), dynamic=True)
    assert "graph_flops" not in figures
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), shared.session_options(case), providers=["CPUExecutionProvider"]
    )
    for batch, resolution in [(2, "7x9"), (1, 1), (3, "4x4"), (1, "13x2"), (2, 20)]:
        sized = case.with_(batch=batch, resolution=resolution)
        reference = compute_reference(LOCAL_ATTENTION, sized, batch)
        parameters = {name: tensors[name] for name in ("rel_row", "rel_col")}
        reference.tensors.update(parameters)
        reference.expected["y"] = LOCAL_ATTENTION.reference(sized, reference.tensors)
        feed = {name: reference.tensors[name].float().numpy() for name in ("q", "k", "v")}
        verdict = compare(reference, (torch.from_numpy(session.run(["y"], feed)[0]),))
        assert verdict.ok, f"{sized.describe()}: {verdict.reason}"
    feed = {name: torch.randn(1, 12, 9, 13).numpy() for name in ("q", "k", "v")}
    feed["v"][0, 0, 0, 0] = float("inf")
    (y,) = session.run(["y"], feed)
    assert np.argwhere(~np.isfinite(y)).tolist() == [[0, c, i, j] for c in range(4) for i in range(3) for j in range(3)]


def test_what_cannot_run_says_so() -> None:
    can = impls.get("onnx").supports
    assert "forward" in (can(SMALL.with_(mode="training")) or "")
    assert "one map" in (impls.get("onnx_dynamic").supports(SMALL.with_(position="absolute")) or "")
    assert "bfloat16" in (can(SMALL.with_(dtype="bfloat16")) or "")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "pip install onnxruntime-gpu" in (can(SMALL.with_(device="cuda")) or "")


@pytest.mark.parametrize("name", EXPORTED)
def test_a_missing_package_is_named_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = session.find_spec
    monkeypatch.setattr(session, "find_spec", lambda package: None if package == "onnxscript" else found(package))
    row = prepare(name, SMALL, 1, lambda stage: None, {}).row
    assert row["status"] == "skipped"
    assert row["reason"] == "onnxscript not installed: pip install onnxscript"


def test_an_opset_that_the_runtime_lacks_is_an_error_row(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = shared.export

    def future(*args: object, **kwargs: object) -> object:
        model, figures = exported(*args, **kwargs)  # type: ignore[arg-type]
        model.opset_import[0].version = 999
        return model, figures

    monkeypatch.setattr(shared, "export", future)
    row = prepare("onnx_conv3x3", SMALL, 1, lambda stage: None, {}).row
    assert row["status"] == "error"
    assert "opset" in row["reason"].lower()


def test_a_failed_export_is_an_error_row_that_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise torch.onnx.OnnxExporterError("long story") from ValueError("the cause")

    monkeypatch.setattr(torch.onnx, "export", broken)
    row = prepare("onnx_conv3x3", SMALL, 1, lambda stage: None, {}).row
    assert row["status"] == "error"
    assert row["reason"].endswith("the cause")


def test_headers_that_are_not_there_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path))
    assert str(tmp_path) in (onnx_fused.missing() or "")
    monkeypatch.delenv("ONNXRUNTIME_INCLUDE_DIR")
    monkeypatch.setattr(_attention, "SYSTEM_FOLDERS", ())
    monkeypatch.setattr(_attention, "HEADER_PACKAGE", "no-such-package")
    assert "pip install --no-deps" in (onnx_fused.missing() or "")


@pytest.mark.parametrize(("version", "found"), [(9, False), (16, True), (22, True)])
def test_headers_of_an_older_interface_are_not_compiled_against(
    version: int, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime_cxx_api.h").touch()
    (tmp_path / "onnxruntime_c_api.h").write_text(f"#define ORT_API_VERSION {version}\n")
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path))
    assert (_attention.onnx_headers() == tmp_path) == found
    forward, *_ = _attention.kernels("portable")
    assert ("-DSASA_ONNX" in forward.flags) == found
    if not found:
        assert "1.16 or newer" in (onnx_fused.missing() or "")


def test_models_are_kept_on_request(tmp_path: Path) -> None:
    out, kept = tmp_path / "r.jsonl", tmp_path / "models"
    suite = tmp_path / "s.toml"
    suite.write_text('title = "?"\nimpls = ["onnx_conv3x3"]\n[fixed]\nchannels = 4\nheads = 1\nresolution = 5\n')
    options = ["run", str(suite), "--out", str(out), "--budget", "0.01", "--keep-models", str(kept)]
    result = CliRunner().invoke(cli, options)
    assert result.exit_code == 0, result.output
    (row,) = read([out]).rows
    (path,) = kept.glob("*.onnx")
    assert path.name.startswith("onnx_conv3x3-")
    assert path.stat().st_size == row.extra["model_bytes"]


def test_no_model_is_kept_without_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEEP_MODELS, raising=False)
    monkeypatch.chdir(tmp_path)
    judged("onnx_conv3x3", SMALL)
    assert not list(tmp_path.iterdir())
