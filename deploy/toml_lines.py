"""The line of each key of a TOML file, which `tomllib` does not tell."""

import re
import tomllib
from collections.abc import Iterator

Place = tuple[str, ...]
"""Keys from the top of a file down to a value; entries of arrays count from "0"."""

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|\#[^\n]*)
      | (?P<string>\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\])*"|'[^']*')
      | (?P<mark>[\n\[\]{}=,.])
      | (?P<bare>[^\s\[\]{}=,."'\#]+)""",
    re.VERBOSE | re.DOTALL,
)


def key_lines(text: str) -> dict[Place, int]:
    """The line of each key, table header and array entry of a text that `tomllib` has accepted; lines count from 1.

    A table without a header of its own is where its first key or inner table is.
    """
    return _Scanner(text).lines


def line_of(lines: dict[Place, int], place: Place) -> int | None:
    """The line of a key, or of the innermost thing around it that is there; None where there is nothing around it."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place)


class _Scanner:
    """Reads a text once, statement by statement."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Place, int] = {}
        self.tables: dict[Place, int] = {}  # arrays of tables, with the number of the last table
        self.tokens = list(_tokens(text))
        self.at = 0
        section: Place = ()
        while self.at < len(self.tokens):
            if self._next_is("\n"):
                self.at += 1
            elif self._next_is("["):
                section = self._header()
            else:
                self._pair(section)

    def _next_is(self, *marks: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at][0] in marks

    def _header(self) -> Place:
        line, repeated = self.tokens[self.at][1], self.tokens[self.at + 1][0] == "["
        self.at += 1 + repeated
        *outer, last = self._keys()
        self.at += 1 + repeated
        place: Place = ()
        for key in outer:
            place = self._latest((*place, key))
            self.lines.setdefault(place, line)
        place = (*place, last)
        if repeated:
            self.tables[place] = self.tables.get(place, -1) + 1
            self.lines.setdefault(place, line)
        place = self._latest(place)
        self.lines[place] = line
        return place

    def _latest(self, place: Place) -> Place:
        return (*place, str(self.tables[place])) if place in self.tables else place

    def _keys(self) -> list[str]:
        keys = [self._key()]
        while self._next_is("."):
            self.at += 1
            keys.append(self._key())
        return keys

    def _key(self) -> str:
        word = self.tokens[self.at][0]
        self.at += 1
        return next(iter(tomllib.loads(f"{word} = 0"))) if word[0] in "\"'" else word

    def _pair(self, section: Place) -> None:
        line, place = self.tokens[self.at][1], section
        for key in self._keys():
            place = (*place, key)
            self.lines.setdefault(place, line)
        self.at += 1
        self._value(place)

    def _value(self, place: Place) -> None:
        if self._next_is("{"):
            self.at += 1
            while not self._next_is("}"):
                if self._next_is(",", "\n"):
                    self.at += 1
                else:
                    self._pair(place)
            self.at += 1
        elif self._next_is("["):
            self.at += 1
            entry = 0
            while not self._next_is("]"):
                if self._next_is(",", "\n"):
                    self.at += 1
                else:
                    self.lines[*place, str(entry)] = self.tokens[self.at][1]
                    self._value((*place, str(entry)))
                    entry += 1
            self.at += 1
        else:
            while self.at < len(self.tokens) and not self._next_is(",", "\n", "]", "}"):
                self.at += 1


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Each word and mark with its line."""
    line = 1
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "skip":
            yield match[0], line
        line += match[0].count("\n")
