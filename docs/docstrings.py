"""Docstrings for the API reference: parameters become lists, and aligned columns keep their spaces.

In the code, a parameter is explained on a line of its own, `name: explanation`, with no mark of a list.
"""

import re
from typing import Any

from griffe import Class, Docstring, Extension, Function, Object

_EXPLAINED = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): ")
_COLUMNS = re.compile(r"\S {3,}\S")


class Readable(Extension):
    """Changes each docstring to Markdown that shows what its plain text shows."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if isinstance(obj.docstring, Docstring):
            names = {p.name for p in obj.parameters} if isinstance(obj, Class | Function) else set()
            obj.docstring.value = as_markdown(obj.docstring.value, names)


def as_markdown(text: str, parameters: set[str]) -> str:
    """Return a docstring as Markdown. parameters: the names whose explanations become items of a list."""
    return "\n\n".join(_paragraph(paragraph.split("\n"), parameters) for paragraph in text.split("\n\n"))


def _paragraph(lines: list[str], parameters: set[str]) -> str:
    if sum(bool(_COLUMNS.search(line)) for line in lines) > 1:
        return "\n".join(f"    {line}" for line in lines)
    shown: list[str] = []
    in_list = False
    inside = "|".join(map(re.escape, parameters)) or "(?!)"  # a parameter that another line explains too
    lines = re.sub(rf"(?<=\.) (?=(?:{inside}): |Raises [A-Z])", "\n", "\n".join(lines)).split("\n")
    for line in lines:
        found = _EXPLAINED.match(line)
        if found and set(found[1].split(", ")) <= parameters:
            shown += [""] * (not in_list) + [f"- `{found[1]}`: {line[found.end() :]}"]
            in_list = True
        elif in_list and line.startswith(("Returns ", "Raises ")):
            shown += ["", line]
            in_list = False
        else:
            shown.append(f"    {line.strip()}" if in_list else line)
    return "\n".join(shown)
