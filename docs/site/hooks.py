"""What mkdocs does beyond the pages of docs/: the README as the first page, generated pages, and the files of the repository that
pages link to."""

import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, TABLES

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)(#[^)\s]*)?(\))")
HOME = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
CODE = {".py": "python", ".toml": "toml", ".jsonl": "json"}


def _place(path: str) -> str | None:
    """Where a file of the repository is on the site; None where there is none, or a folder."""
    if not (ROOT / path).is_file():
        return None
    if path in HOME:
        return HOME[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}.md" if PurePosixPath(path).suffix in CODE else f"repository/{path}"


def _relinked(text: str, path: str, wanted: list[str]) -> str:
    """`text` of the file `path` of the repository with its links as the site has them; `wanted` gets those outside docs/."""

    def link(match):
        target = normpath(PurePosixPath(path).parent / match[2])
        place = _place(target)
        if place is None:
            return match[0]  # a folder is shown by its README, if at all; else the strict build says so
        if not target.startswith("docs/"):
            wanted.append(target)
        return f"{match[1]}{relpath(place, PurePosixPath(_place(path)).parent)}{match[3] or ''}{match[4]}"

    return LINK.sub(link, text)


def _content(path: str, wanted: list[str]) -> str | bytes:
    language = CODE.get(PurePosixPath(path).suffix)
    if language:
        return f"# {path}\n\n```{language}\n{(ROOT / path).read_text()}\n```\n"
    return _relinked((ROOT / path).read_text(), path, wanted) if path.endswith(".md") else (ROOT / path).read_bytes()


def on_files(files, config):
    for place, make in PAGES.items():
        files.append(File.generated(config, place, content=make()))
    wanted = list(HOME)
    for path in sorted(ROOT.glob("docs/**/*.md")):
        _relinked(path.read_text(), path.relative_to(ROOT).as_posix(), wanted)
    done = set()
    while wanted:  # what they link to, and what that links to
        path = wanted.pop()
        if path not in done:
            done.add(path)
            files.append(File.generated(config, _place(path), content=_content(path, wanted)))
    return files


def on_page_markdown(markdown, page, config, files):
    for mark, make in TABLES.items():
        markdown = markdown.replace(mark, make())
    if page.file.generated_by:
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", [])
