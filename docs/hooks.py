# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: links out of docs/, docstrings, and the table of training options.

A page may link to a file of the repository outside of docs/, as ``../benchmarks/results/macs.json``. Such a link works
where the pages are read in the repository. The site gets a copy of the file, and a link to it.

Docstrings name classes and functions with Sphinx's roles. The site shows the name alone.

A page has ``<!-- options -->`` where the options of training are listed.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(((?:\.\./)+)([^)#]+)\)")


ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):(?=<code>)")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page without roles before code."""
    return ROLE.sub("", html)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links into the site instead of links to the repository's files."""
    depth = page.file.src_uri.count("/") + 1

    def link(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        if match[1] != "../" * depth or not path.is_file():
            return match[0]  # mkdocs says what is wrong with it
        uri = f"repository/{match[2]}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        return f"]({'../' * (depth - 1)}{uri})"

    markdown = LINK.sub(link, markdown)
    return markdown.replace(OPTIONS, options()) if OPTIONS in markdown else markdown


OPTIONS = "<!-- options -->"


def options() -> str:
    """Tables of every training option, a table for each group that the options are in."""
    from spade_fast.train.config import TrainConfig  # it imports torch

    rows: dict[str, list[str]] = {}
    for field in dataclasses.fields(TrainConfig):
        default = "" if field.default is None else f"`{str(field.default).lower()}`"
        text = re.sub(r" \(default: [^()]*\)$", "", field.metadata["help"]) if default else field.metadata["help"]
        name = f"--{field.name.replace('_', '-')}"
        rows.setdefault(field.metadata.get("group", ""), []).append(f"| `{name}` | {default} | {text} |")
    head = "| option | default | what it does |\n| --- | --- | --- |\n"
    return "\n\n".join((f"**{group}**\n\n" if group else "") + head + "\n".join(lines) for group, lines in rows.items())
