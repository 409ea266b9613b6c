"""What the site of the documentation has beside docs/: hooks of MkDocs, named in mkdocs.yml.

The README is its first page, CONTRIBUTING.md and CHANGELOG.md are pages, and the reference of the command is made
from the command, each time the site is built: what is made from something else is in no file that could be forgotten.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files beside docs/ that are pages of the site, and the names that they have there."""
COMMAND = re.compile(r"<!-- the command -->\n.*?<!-- end of the command -->\n", re.DOTALL)
"""What the reference of the command takes the place of."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not hold."""
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=as_page((ROOT / name).read_text())))
    return files


def as_page(text: str) -> str:
    """The Markdown of a file in the root with its links as they are among the pages.

    A link to a file that is no page, such as a script, becomes its words: the site holds no source.
    """

    def moved(link: re.Match[str]) -> str:
        words, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if path in OUTSIDE:
            return f"[{words}]({OUTSIDE[path]}{hash_}{anchor})"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{words}]({path.removeprefix('docs/')}{hash_}{anchor})"
        return words

    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", moved, text)


def command() -> str:
    """Every command with its arguments and options, as typer tells them, without what is said of them all."""
    asked = [sys.executable, "-m", "typer", "w8a8.cli.commands", "utils", "docs", "--name", "w8a8"]
    told = subprocess.run(asked, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return told[told.index("\n## ") + 1 :]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the command into its page; leave out the notes to the tests above blocks that they treat in another way."""
    if COMMAND.search(markdown):
        told = command()
        markdown = COMMAND.sub(lambda _: told, markdown)
    return re.sub(r"^<!-- (?:slow|not run): [^\n]* -->\n", "", markdown, flags=re.MULTILINE)
