"""Whether many files are there."""

import os
from pathlib import Path


class Files:
    """Those below a folder, of which each folder is read once instead of asking for every file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, set[str]] = {}

    def has(self, name: str) -> bool:
        folder, file = os.path.split(os.path.join(self.folder, name))
        if folder not in self.names:
            try:
                with os.scandir(folder) as entries:
                    self.names[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                self.names[folder] = set()
        # Where letters' case does not matter, or folders must not be listed, a file is there that is not listed.
        return file in self.names[folder] or os.path.isfile(os.path.join(folder, file))
