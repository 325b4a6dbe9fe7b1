"""Split a command line into `--dotted.name value …` options by the fields of a record; pydantic parses the values."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from shlex import join
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ldm.errors import UserError


class Option(NamedTuple):
    """Option as written on the command line."""

    value: Any
    """Words of the option, nested like its type; for a flag, True or False."""
    text: str
    """Text of the option as typed in a shell: its name and words."""


_ELSEWHERE = {  # names of the same options in diffusers and other programs
    "learning_rate": "optimizer.lr",
    "max_train_steps": "steps",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "num_images",
    "train_batch_size": "batch_size",
    "mixed_precision": "precision",
    "output_dir": "out",
    "cfg_scale": "guidance_scale",
    "cfg": "guidance_scale",
}


def read_options(kind: type, arguments: Sequence[str], *, flags: bool, also: Collection[str] = ()) -> dict[str, Option]:
    """Return the options by dotted field name; a later option replaces an earlier one with the same name.

    flags: a boolean is given as --name or --no-name. also: words that the program accepts besides, for suggestions.
    Raises UserError for unknown options and for too few or too many values.
    """
    types, remaining = dict(_fields(kind)), list(arguments)
    options: dict[str, Option] = {}
    switches = {name for name, hint in types.items() if flags and hint is bool}
    while remaining:
        word, equals, value = remaining.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if (switch := name.removeprefix("no_")) in switches and _is_option_name(word):
            if equals or (remaining and not _is_option_name(remaining[0])):
                text = f"{word}={value}" if equals else join([word, remaining[0]])
                flag = switch.replace("_", "-")
                raise UserError(f"{text}: {word} takes no value; give --{flag} or --no-{flag}")
            options[switch] = Option(name in switches, word)
            continue
        if not _is_option_name(word) or name not in types:
            raise UserError(_unknown(word + equals + value, [*types, "help", *also]))
        words, count = [value] if equals else [], _word_count(types[name])
        while remaining and not _is_option_name(remaining[0]) and len(words) < (count or len(arguments)):
            words.append(remaining.pop(0))
        text = join([word, *words])
        if count and len(words) != count and words != ["None"]:
            raise UserError(f"{text}: needs " + (f"{count} values" if count > 1 else f"a value{_few(types[name])}"))
        if (group := _group_size(types[name])) and len(words) % group:
            raise UserError(f"{text}: needs {group} values for each entry; --help describes them")
        options[name] = Option(nested_words(types[name], words), text)
    return options


def field_names(kind: type) -> list[str]:
    """Return the dotted names of all fields, including those of nested records and the records themselves."""
    names = [name for name, _ in _fields(kind)]
    records = (name.split(".")[:k] for name in names for k in range(1, name.count(".") + 1))
    return [*names, *dict.fromkeys(map(".".join, records))]


def similar(name: str, names: Collection[str]) -> list[str]:
    """Return the names that someone may mean who writes `name`, the likeliest first; all have underscores."""
    if name in _ELSEWHERE and _ELSEWHERE[name] in names:
        return [_ELSEWHERE[name]]
    if inside := [n for n in names if n.endswith(f".{name}")]:
        return inside
    if close := get_close_matches(name, names, 1, 0.7):
        return close
    last = name.rpartition(".")[2]  # the name without its record, or in another record
    if last in names:
        return [last]
    ends = {n.rpartition(".")[2]: n for n in names}
    return [ends[end] for end in get_close_matches(last, ends, 1, 0.7)] or get_close_matches(name, names, 1)


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and type of each field, including the fields of nested records."""
    types = get_type_hints(kind)
    for name in (field.name for field in fields(kind)):
        if is_dataclass(hint := types[name]):
            yield from _fields(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, hint


def _is_option_name(word: str) -> bool:
    """Return whether a word is an option name. A word with one dash or none is a value, e.g. a negative number."""
    return re.match(r"--[A-Za-z]", word) is not None


def _unknown(word: str, names: Collection[str]) -> str:
    """Return a message on a word that isn't an option or a value of one, with similar options if there are any."""
    name = word.partition("=")[0]
    if not _is_option_name(word) and not (word.startswith("-") and name.lstrip("-").replace("-", "_") in names):
        first = "the configuration must be the first argument, and " if "print_config" in names else ""
        return f"{word!r} isn't the value of any option: {first}a value that contains spaces must be in quotes"
    found = [f"--{n.replace('_', '-')}" for n in similar(name.lstrip("-").replace("-", "_").lower(), names)]
    return f"unknown option {word}: " + (f"did you mean {' or '.join(found)}?" if found else "--help lists all options")


def _few(hint: Any) -> str:
    """Return the values of a type that has few, after a colon; "" for other types."""
    choices = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
    return f": {', '.join(map(str, choices[:-1]))} or {choices[-1]}" if choices else ""


def _word_count(hint: Any) -> int | None:
    """Return the number of words that a type takes; None: any number."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is tuple:
        return None if parts[-1] is ... else len(parts)
    return _word_count(parts[0]) if NoneType in get_args(hint) else 1


def _group_size(hint: Any) -> int | None:
    """Return the number of words in each entry of a sequence of tuples; None for other types."""
    parts = get_args(hint)
    return _word_count(parts[0]) if get_origin(hint) is tuple and parts[-1] is ... else None


def nested_words(hint: Any, words: Sequence[str]) -> Any:
    """Return the words as nested lists, as None, or as a single word."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    if NoneType in get_args(hint):
        return None if words == ["None"] else nested_words(parts[0], words)
    if get_origin(hint) is not tuple:
        return words[0]
    if parts[-1] is not ...:
        return words
    step = _word_count(parts[0]) or 1
    return [nested_words(parts[0], words[k : k + step]) for k in range(0, len(words), step)]
