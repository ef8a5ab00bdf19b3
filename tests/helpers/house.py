"""The rooms of the house and the imports between them, read from the source with `ast`.

`make map` prints them: each room with its one-line purpose and the rooms that it imports from. `tests/test_house.py`
keeps the order.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "ist"
ORDER = [
    "config",
    "runtime",
    "runs",
    "method",
    "adapters",
    "step",
    "probing",
    "bottleneck",
    "focusing",
    "tuner",
    "integrations",
    "experiments",
    "cli",
]
"""From the ground floor up: a room imports only from rooms before it."""
DOORS = {"__init__", "__main__", "_version"}
"""Not rooms: the package's table of contents, its command, its version."""


def rooms(source: Path = SOURCE) -> list[str]:
    """The files and folders at the top of the package, without its doors."""
    files = {path.stem for path in source.glob("*.py")} - DOORS
    folders = {path.name for path in source.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    return sorted(files | folders)


def modules(room: str, source: Path = SOURCE) -> list[Path]:
    """The files of a room."""
    folder = source / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported_modules(file: Path, source: Path = SOURCE) -> Iterator[str]:
    """What a file imports from the package, as dotted names below it: anywhere in the file, relative or not."""
    package = file.relative_to(source).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("ist.") for alias in node.names if alias.name.startswith("ist."))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif node.module and node.module.split(".")[0] == "ist":
                base = ()
            else:
                continue
            inner = tuple((node.module or "").split(".")) if node.module else ()
            inner = inner[1:] if not node.level else inner
            for alias in node.names:
                yield ".".join((*base, *inner, alias.name))


@functools.cache
def room_imports(source: Path = SOURCE) -> dict[str, set[str]]:
    """For each room, the other rooms that it imports from."""
    arrows: dict[str, set[str]] = {}
    for room in rooms(source):
        found = {name.split(".")[0] for file in modules(room, source) for name in imported_modules(file, source)}
        arrows[room] = found & set(rooms(source)) - {room}
    return arrows


def purpose(room: str, source: Path = SOURCE) -> str:
    """The first line of a room's docstring."""
    path = source / room
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]


def circles(source: Path = SOURCE) -> list[tuple[str, str]]:
    """Pairs of modules that import each other while they are loaded, directly or through others."""
    graph = {}
    for file in sorted(source.rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        graph[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    arrows = {}
    for name, file in graph.items():
        targets = set()
        for imported in imported_modules(file, source):
            target = imported
            while target and target not in graph:
                target = target.rpartition(".")[0]
            if target and target != name:
                targets.add(target)
        arrows[name] = targets
    return sorted((a, b) for a in arrows for b in arrows[a] if a < b and reaches(arrows, b, a))


def reaches(arrows: dict[str, set[str]], start: str, end: str) -> bool:
    """Whether a path of imports leads from one module to another."""
    seen, waiting = {start}, [start]
    while waiting:
        for target in arrows[waiting.pop()] - seen:
            if target == end:
                return True
            seen.add(target)
            waiting.append(target)
    return False


def main() -> None:
    """Print the map, the ground floor first."""
    arrows = room_imports()
    for room in sorted(arrows, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in modules(room))
        print(f"{room:13} {lines:5}  {purpose(room)}")
        if arrows[room]:
            print(f"{'':20} imports {', '.join(sorted(arrows[room], key=ORDER.index))}")
    print(f"{len(arrows)} packages, {sum(map(len, arrows.values()))} imports between them")


if __name__ == "__main__":
    sys.exit(main())
