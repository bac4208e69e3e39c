from __future__ import annotations

import json
import subprocess
import sys

import pytest

import skhead
from skhead.cli import main


def test_report_writes_and_prints_the_page(tmp_path, capsys):
    target = tmp_path / "a" / "b"
    assert main(["report", "skhead/induction-2l", "-o", str(target), "--k", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{target / 'report.html'}\n"
    assert "skhead: reading the headers of skhead/induction-2l" in err
    assert json.loads((target / "summary.json").read_text())["comparison"]["k"] == 3


def test_demo_is_the_report_on_the_bundled_model(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path), "--no-composition"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["source"]["source"] == "skhead/induction-2l"
    assert summary["composition"] is None
    assert "report.html" in capsys.readouterr().out


def test_options_reach_the_estimators(tmp_path):
    options = ["--fold-norm", "--center", "--labels", "none", "--max-memory", "50MB"]
    options += ["--null", "empirical"]
    assert main(["report", "skhead/induction-2l", "-o", str(tmp_path), *options]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["comparison"]["record"] == {"fold_norm": True, "center": True, "rank": None}
    assert summary["classes"] is None
    assert summary["nulls"]["chosen"] == "empirical"
    assert summary["cards"]["missing"] == {}


def test_cards_are_left_out_on_request(tmp_path):
    assert main(["demo", "-o", str(tmp_path), "--no-cards"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["cards"] is None


def test_operations_on_request(tmp_path):
    texts = [" " + a + b + "x" for a in "abcdefgh" for b in "klmnop"]
    tokens, pairs = tmp_path / "tokens.json", tmp_path / "pairs.csv"
    tokens.write_text(json.dumps(texts))
    rows = [f"same,{text.strip()},{text.strip()}" for text in texts[2:40]]
    pairs.write_text("\n".join(["operation,source,target", *rows]))
    for asked, name, kept in (("token_copying", "token_copying", 48), (pairs, "same", 38)):
        options = ["--operations", str(asked), "--tokenizer", str(tokens), "--no-cards"]
        target = tmp_path / name
        assert main(["report", "skhead/induction-2l", "-o", str(target), *options]) == 0
        found = json.loads((target / "summary.json").read_text())["operations"]
        assert found["counts"][name]["n_kept"] == kept


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["no/such/model", "-o", "out"], "no/such/model"),
        (["skhead/induction-2l", "-o", "out", "--part", "encoder"], "part='encoder'"),
        (["skhead/induction-2l", "-o", "out", "--labels", "no.csv"], "labels 'no.csv' is neither"),
        (["skhead/induction-2l", "-o", "out", "--labels", "wang2022"], "12"),
        (["skhead/induction-2l", "-o", "out", "--device", "abacus"], "device 'abacus' cannot"),
        (["skhead/induction-2l", "-o", "out", "--null", "beta"], "null must be one of 'haar'"),
        (["skhead/induction-2l", "-o", "out", "--max-memory", "much"], "max_memory must be"),
        (["skhead/induction-2l", "-o", "out", "--operations", "all"], "on the command line --tok"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["report", *arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("skhead: error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_directory_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "-o", str(tmp_path / "taken")]) == 2
    assert "skhead: error: " in capsys.readouterr().err


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="max_memory"):
        main(["demo", "-o", str(tmp_path), "--max-memory", "much", "--traceback"])


@pytest.mark.parametrize("k", ["0", "-1", "2.5", "many"])
def test_k_must_be_a_positive_integer(k, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "-o", str(tmp_path), f"--k={k}"])
    assert f"argument --k: must be a positive integer, got '{k}'" in capsys.readouterr().err


def test_version_and_help_need_no_torch():
    code = "import sys, skhead.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = subprocess.run(
        [sys.executable, "-m", "skhead", "--version"], check=True, capture_output=True, text=True
    )
    assert shown.stdout == f"skhead {skhead.__version__}\n"
