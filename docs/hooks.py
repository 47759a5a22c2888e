"""The README is the first page: mkdocs takes it from here instead of a copy."""

from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The README for index.md, its links into docs/ as seen from there; any other page as it is."""
    if page.file.src_uri != "index.md":
        return markdown
    return README.read_text().replace("](docs/", "](")
