"""Pack the records of a study's finished runs, from which its tables can be made again.

    python -m studies.pack_records STUDY_FOLDER          # writes studies/records/NAME.tar.xz
    mkdir again && tar -xf studies/records/NAME.tar.xz -C again
    fedlora compare studies/NAME.toml --output again --only-table

Without ``--only-table`` the study goes on from there. The models are left out, and so are
the places where they lay.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
SUMMARY = "summary.json"  # last in a folder: it says that all is there
KEPT = ("config.json", "metrics.jsonl", SUMMARY)
TABLE = "testbed.csv"  # of a run on a testbed alone


def packed(study: Path, target: Path) -> int:
    """Write an archive of a study's records; return how many runs are in it."""
    runs = sorted(file.parent for file in study.rglob(SUMMARY))
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for run in runs:
            place = run.relative_to(study.parent)
            for name in (*([TABLE] if (run / TABLE).exists() else []), *KEPT):
                text = (run / name).read_text(encoding="utf-8")
                if name.endswith(".json"):
                    text = text.replace(json.dumps(f"{run}")[1:-1], str(place))
                content = text.encode()
                entry = tarfile.TarInfo(str(place / name))
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
    return len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path, help="the folder that `compare` made, named as it")
    args = parser.parse_args()
    study = args.study.absolute()
    RECORDS.mkdir(exist_ok=True)
    target = RECORDS / f"{study.name}.tar.xz"
    print(f"{packed(study, target)} runs: {target}")


if __name__ == "__main__":
    main()
