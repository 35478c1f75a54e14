"""The documents of the project and the code blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in
         sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])}
"""Text of every page by its path below the project's folder."""

_BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)"
                    r"[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason` says why it is not run, where the comment before it does."""

    page: str
    language: str
    body: str
    reason: str | None = None
    output: str | None = None

    @property
    def example(self) -> str | None:
        """The file of examples/ that the block is a part of, named in its first line."""
        named = re.match(r"# (examples/\w+\.py)\n", self.body)
        return named[1] if named else None


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order; a text block that follows another is its output."""
    found: list[Block] = []
    for match in _BLOCK.finditer(PAGES[page]):
        indent = len(match["indent"])
        body = "".join(line[indent:] or "\n" for line in match["body"].splitlines(keepends=True))
        if match["language"] == "text" and found:
            last = found[-1]
            found[-1] = Block(last.page, last.language, last.body, last.reason, body)
        else:
            found.append(Block(page, match["language"], body, match["reason"]))
    return found


def blocks_of(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def shell_lines(block: Block) -> list[str]:
    """The commands of a console block: without prompt and comment, continued lines joined."""
    lines = (line.removeprefix("$ ").split("  #")[0].strip()
             for line in block.body.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
