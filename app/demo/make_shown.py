"""Makes what the tabs show when the page opens: `python -m diffgraft.app.demo.make_shown [TAB ...]`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .server import TABS
from .shown import FOLDER, replaced
from .studio import Studio


def write(tab: str, outputs: Iterable[Any], folder: Path = FOLDER) -> None:
    """Keep what a handler gave: its pictures, beside a JSON file with everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{tab}[-.]*"):
        old.unlink()
    names: dict[str, str] = {}

    def kept(value: Any) -> Any:
        if not (isinstance(value, str) and value.endswith(".png") and Path(value).is_file()):
            return value
        if value not in names:
            names[value] = f"{tab}-{len(names)}.png"
            shutil.copyfile(value, folder / names[value])
        return {"file": names[value]}

    text = json.dumps(replaced(list(outputs), kept), indent=1, ensure_ascii=False)
    (folder / f"{tab}.json").write_text(text + "\n", "utf-8")


def main(names: Iterable[str]) -> None:
    """Run the first example of the named tabs, or of all."""
    studio, wanted = Studio(), set(names)
    for kind in TABS.values():
        if not wanted or kind.name in wanted:
            tab = kind(studio)
            write(tab.name, getattr(tab, tab.name)(**tab.first))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        main(sys.argv[1:])
