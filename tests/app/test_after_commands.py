"""The commands after training: what they print, and with which code they end."""

import json

import pytest

from fedlora_app.cli.main import main


def test_from_rows_to_an_export(runs, tmp_path, capsys):
    run = str(runs("texts, merged"))
    (tmp_path / "rows.csv").write_text("id,text\n7,oil price\n8,\n")
    out = tmp_path / "out.jsonl"
    words = ["predict", run, "--input", tmp_path / "rows.csv", "--output", out, "--keep", "id"]
    assert main([*words, "evaluate.batch-size=2"]) == 1
    assert "1 of 2 rows answered" in capsys.readouterr().out
    assert json.loads(out.read_text().splitlines()[0])["id"] == "7"
    assert main(["evaluate", run, "--output", tmp_path / "e"]) == 0
    assert "calibration error" in capsys.readouterr().out
    assert main(["export", run, "--to", tmp_path / "a", "--rank", "1"]) == 0
    assert "an adapter, rank 1, cut: " in capsys.readouterr().out
    rows = ["oil price,bank", "bank rate,oil"] * 6
    (tmp_path / "site.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    words = ["personalise", run, "--data", tmp_path / "site.csv", "--output", tmp_path / "own"]
    assert main([*words, "--steps", "2", "--every", "1"]) == 0
    assert "rows trained, 2 said when to stop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "nowhere", "--input", "a.csv", "--output", "b.jsonl"], "of a finished run"),
        (["evaluate", "nowhere"], "of a finished run"),
        (["export", "nowhere", "--to", "there", "--dtype", "int8"], "dtype: expected one of float"),
        (["personalise", "nowhere", "--data", "a.csv", "--output", "m"], "of a finished run"),
    ],
)
def test_what_cannot_be_ends_with_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
