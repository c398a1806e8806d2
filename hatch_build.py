"""README as a package index shows it: links lead to the repository, once `pyproject.toml` has its address."""

import pathlib
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute(text: str, repository: str) -> str:
    """Return Markdown whose relative links lead into a repository, and whose pictures come from there."""
    pictures = rf"\1{repository}/raw/main/\2"
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)([^)]+)", pictures, text)
    text = re.sub(r'(<img src=")(?!https?:)([^"]+)', pictures, text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)([^)]+)", rf"\1{repository}/blob/main/\2", text)


class ReadmeHook(MetadataHookInterface):
    """Puts README into the metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the text; "Repository" in ``[project.urls]`` makes its links absolute."""
        text = pathlib.Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, repository) if repository else text,
        }
