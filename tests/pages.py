"""The Markdown pages of the repository: README.md and docs/."""

import re
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = (README, REPOSITORY / "CHANGELOG.md", *sorted(DOCS.rglob("*.md")))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def code_blocks(page: Path, language: str, section: str | None = None) -> list[str]:
    """
    The blocks of code in a language on a page, or in the section of it with a heading of the second level.
    """
    text = page.read_text(encoding="utf-8")
    if section is not None:
        sections = re.split(r"^## ", text, flags=re.MULTILINE)
        [text] = [one for one in sections if one.startswith(f"{section}\n")]
    return [block for found, block in _BLOCK.findall(text) if found == language]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))
