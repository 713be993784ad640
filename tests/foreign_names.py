"""What a user's folder may hold, by our packages' names."""

from pathlib import Path


def foreign_names(folder: Path) -> Path:
    """Fill a folder with a `train.py`, a `preprocess.py` and data in `shared`; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "preprocess"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    (folder / "shared").mkdir()
    (folder / "shared" / "notes.txt").write_text("of the user's own\n")
    return folder
