"""`python -m twotower.bench` and `twotower bench` from end to end, on the tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twotower.bench import command, plot
from twotower.bench.report import Report
from twotower.cli.main import app
from twotower.kernels.launch_table import table_of

SMALL = ["--batches", "2", "--repeats", "1", "--scans", "64", "--scan-rows", "8"]


def test_every_section_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "bench.json", tmp_path / "bench.md"
    arguments = [*SMALL, "--device", "cpu", "--profiles", "loop", "--long-rows", "2"]
    done = command.main([*arguments, "--out", str(out), "--table", str(table)])
    assert done == 0
    report = json.loads(out.read_text())
    assert {step["status"] for step in report["steps"]} == {"done"}
    assert report["hardware"]["device"] == "CPU"
    for section in ("decode", "ratios", "baseline", "operators", "attention", "scans"):
        assert report[section], section
    assert [entry["bits_differ"] for entry in report["invariance"]] == [0.0, 0.0]
    passes = [own for entry in report["decode"] for own in entry["passes"]]
    assert {own["kind"] for own in passes} == {"denoise", "ar", "extend", "verify"}
    assert all(own["unique_experts"] > 0 for own in passes)
    headline = [own for own in report["ratios"] if own["profile"] == "headline"]
    assert {own["sync"] for own in headline} == {"in step", "continuous"}
    for own in headline:
        assert own["nfe_a_block"] == pytest.approx(5.6)
        expected = own["diffusion_share_of_floor"] / own["ar_share_of_floor"]
        assert own["share_of_ceiling"] == pytest.approx(expected)
    assert report["scans"][0]["bad_rows"] == 0
    printed = capsys.readouterr().out
    assert table.read_text() in printed
    others = ("Against plain PyTorch", "Operators", "Rows in a batch against themselves alone")
    for title in ("Decoding", "mask_diffusion over AR", *others):
        assert f"### {title}" in printed
    assert "on CPU" in printed
    assert "Not measured" not in printed


def test_the_console_script_hands_everything_on(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", *SMALL, "--sections", "scans", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["scans"][0]["scans"] == 64
    assert CliRunner().invoke(app, ["bench", "--batches", "0"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unique", "99"], "unique: got 99.0, expected 0 or 1 to 15"),
        (["--batches", "one"], "invalid _numbers value: 'one'"),
    ],
)
def test_wrong_arguments_end_with_their_names(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["--device", "cpu", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_there_is_no_picture_but_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = [*SMALL, "--sections", "scans", "--out", str(out), "--plot", str(picture)]
    assert command.main(arguments) == 0
    assert "needs matplotlib; pip install 'twotower[bench]'" in capsys.readouterr().err
    assert json.loads(out.read_text())["scans"]
    assert not picture.exists()


def test_a_picture_with_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    passes = [{"kind": "ar", "share_of_floor": 0.5}, {"kind": "extend"}]
    decode = [
        {"mode": "ar", "profile": None, "rows": 1, "tokens_per_s": 9.0, "passes": passes},
        {"mode": "verified", "profile": None, "rows": 1, "tokens_per_s": 9.0, "passes": []},
    ]
    ratios = [{"profile": "loop", "sync": "in step", "rows": 1, "ratio": 1.5, "ceiling": 2.0}]
    report = {
        "decode": decode,
        "ratios": ratios,
        "hardware": {"device": "CPU"},
        "options": {"preset": "tiny", "dtype": "float32", "context": 128},
        "date": "2026-01-01",
    }
    plot.plot(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "grpc", "google", "pydantic", "typer", "matplotlib"):
            raise ImportError(f"blocked: {name}")
        return None

sys.meta_path.insert(0, Blocker())
from twotower.bench.command import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_runs_with_torch_and_little_else(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *SMALL, "--sections", "scans", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["scans"]


def test_a_launch_table_holds_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    path.write_text('{"card": "any", "kernels": {"replay_token": [{"channels": 8}]}}')
    seen: list[object] = []

    def suite(*_: object) -> Report:
        seen.append(table_of(torch.device("cpu")).kernels)
        return Report({}, {})

    monkeypatch.setattr(command, "run_suite", suite)
    monkeypatch.setattr(command, "markdown", lambda _: "tables")
    out = ["--out", str(tmp_path / "bench.json"), "--device", "cpu"]
    assert command.main([*out, "--launch-table", str(path)]) == 0
    assert seen == [{"replay_token": [{"channels": 8}]}]
    path.write_text("{}")
    with pytest.raises(SystemExit):
        command.main([*out, "--launch-table", str(path)])
    assert "no table of launches" in capsys.readouterr().err
