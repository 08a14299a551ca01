"""The folder rule and the size budgets, checked over the whole tree: `python tests/check_folders.py [ROOT]`.

Folder rule: a folder of csrc/ includes only itself and folders above it in ORDER; plan, pack and transport never
include one another; no transport includes another transport. Budgets: see the constants. Also: every file opens with
a comment or docstring, and no file is named after what it is not about (util, common, helper, misc).

Exit code 0, or 1 with one line per finding. Run by .ci/run and pre-commit; needs only the standard library.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ORDER = ("core", "shim", "sys", "plan", "pack", "transport", "engine", "bindings")
APART = {"plan", "pack", "transport"}
TRANSPORTS = {"loopback", "shm", "tcp", "cuda_ipc", "rdma", "nccl"}
FILE_LINES = {".cpp": 500, ".cu": 500, ".py": 500, ".hpp": 200}
FUNCTION_LINES = 60
VIRTUALS = 8  # per class, the destructor aside
VAGUE = {"util", "utils", "common", "helper", "helpers", "misc"}
ENVIRONMENT_READER = "csrc/core/config.cpp"
CODE_FOLDERS = ("csrc", "python", "tests", "bench", "cmake", "examples")

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_NOT_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"\((?:.*?)\)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*',
    re.DOTALL | re.MULTILINE,
)
_CONTAINER = re.compile(r"\b(namespace|class|struct|union|extern)\b")
_CLASS = re.compile(r"\b(?:class|struct)\s+(?:\[\[\w+\]\]\s*)?(\w+)[^;()]*$")


def check_includes(path: str, text: str) -> Iterator[str]:
    """Findings of the folder rule in one file under csrc/; path is relative to the repository."""
    parts = path.split("/")
    folder = parts[1]
    if folder not in ORDER or len(parts) < 3:
        yield f"{path}: csrc/{folder} is not one of the folders {', '.join(ORDER)}"
        return
    for included in _INCLUDE.findall(text):
        other = included.split("/")[0]
        if other not in ORDER or "/" not in included:
            yield f'{path}: #include "{included}" is not written from csrc/ (as "core/types.hpp")'
        elif ORDER.index(other) > ORDER.index(folder):
            yield f'{path}: #include "{included}": {folder} stands above {other} and may not include it'
        elif {folder, other} <= APART and folder != other:
            yield f'{path}: #include "{included}": plan, pack and transport never include one another'
        elif folder == other == "transport":
            ours, theirs = parts[2], included.split("/")[1]
            if theirs in TRANSPORTS and theirs != ours:
                yield f'{path}: #include "{included}": a transport may not include another transport'


def blank(match: re.Match[str]) -> str:
    """Comments, literals and directives as spaces, so that lines keep their numbers."""
    return re.sub(r"[^\n]", " ", match[0])


def cpp_functions(code: str) -> Iterator[tuple[int, int, str]]:
    """(first line, lines, header) of every function body at namespace or class level; by matching braces."""
    stack: list[tuple[str, int, str]] = []  # (kind, line, header) of open braces
    header_start, line = 0, 1
    inside = 0  # open functions: braces within them are statements
    for at, char in enumerate(code):
        if char == "\n":
            line += 1
        elif char == "{":
            header = " ".join(code[header_start:at].split())
            kind = "statement" if inside else _kind(header)
            stack.append((kind, line, header))
            inside += kind == "function"
            header_start = header_start if kind == "member" else at + 1
        elif char == "}" and stack:
            kind, first, header = stack.pop()
            inside -= kind == "function"
            if kind == "function":
                yield first, line - first + 1, header
            header_start = header_start if kind == "member" else at + 1
        elif char == ";":
            header_start = at + 1


def _kind(header: str) -> str:
    """What a brace opens, from the text since the last statement."""
    if re.search(r"\)[\w\s]*:.*[:,]\s*[\w:<>]+$|\)[\w\s]*:\s*[\w:<>]+$", header):
        return "member"  # of a constructor's initialisers: `A(int x) : x_{x}`
    return "function" if "(" in header and not _is_container(header) and not _is_value(header) else "container"


def _is_container(header: str) -> bool:
    before = header.split("(")[0]
    return _CONTAINER.search(before) is not None and not re.search(r"[\w>&*]\s+\w+\s*$", before.split("{")[-1])


def _is_value(header: str) -> bool:
    # `constexpr Table kTable = f(...) {`: an "=" outside of parentheses, and no operator's name.
    depth, flat = 0, []
    for char in header:
        depth += (char == "(") - (char == ")")
        if depth == 0:
            flat.append(char)
    return "=" in re.sub(r"operator\s*[=<>!+\-*/]+|<[^<>]*>|[<>=!]=", "", "".join(flat))


def cpp_virtuals(code: str) -> Iterator[tuple[int, str, int]]:
    """(line, name, virtual functions without the destructor) of every class."""
    for match in re.finditer(r"\{", code):
        head = _CLASS.search(code[max(0, match.start() - 300) : match.start()].split("}")[-1].split(";")[-1])
        if head is None:
            continue
        depth, end = 1, match.end()
        while end < len(code) and depth:
            depth += (code[end] == "{") - (code[end] == "}")
            end += 1
        body = re.sub(r"\{[^{}]*\}", "", code[match.end() : end])
        yield code.count("\n", 0, match.start()) + 1, head[1], len(re.findall(r"\bvirtual\b(?!\s*~)", body))


def check_cpp(path: str, text: str) -> Iterator[str]:
    """Budgets of one C++ or CUDA file."""
    code = _NOT_CODE.sub(blank, text)
    for first, lines, header in cpp_functions(code):
        if lines > FUNCTION_LINES:
            yield f"{path}:{first}: function of {lines} lines, at most {FUNCTION_LINES}: {header[-80:]}"
    for line, name, count in cpp_virtuals(code):
        if count > VIRTUALS:
            yield f"{path}:{line}: class {name} has {count} virtual functions, at most {VIRTUALS}"
    if path.startswith("csrc/") and path != ENVIRONMENT_READER and re.search(r"\b(getenv|environ)\b", code):
        yield f"{path}: reads the environment; only {ENVIRONMENT_READER} does"


def check_python(path: str, text: str) -> Iterator[str]:
    """Budgets of one Python file; a docstring does not count towards its function's length."""
    for node in ast.walk(ast.parse(text, path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines -= (first.end_lineno or first.lineno) - first.lineno + 1
        if lines > FUNCTION_LINES:
            yield f"{path}:{node.lineno}: function {node.name} of {lines} lines, at most {FUNCTION_LINES}"


def check_file(path: str, text: str) -> Iterator[str]:
    """Every finding in one file; path is relative to the repository, with forward slashes."""
    suffix = Path(path).suffix
    lines = text.count("\n") + (not text.endswith("\n"))
    if lines > FILE_LINES[suffix]:
        yield f"{path}: {lines} lines, at most {FILE_LINES[suffix]}"
    if VAGUE & set(re.split(r"[_.]", Path(path).name.lower())):
        yield f"{path}: the name says nothing; name it after what it does"
    opens = text.lstrip()
    if opens and not opens.startswith(("#", '"""', 'r"""') if suffix == ".py" else "//"):
        yield f"{path}: does not open with a comment that says what it is for"
    if suffix == ".py":
        yield from check_python(path, text)
        return
    yield from check_cpp(path, text)
    if path.startswith("csrc/"):
        yield from check_includes(path, text)


def files(root: Path) -> Iterator[str]:
    """Source files under the code folders, relative to root."""
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix in FILE_LINES and "__pycache__" not in path.parts:
                yield path.relative_to(root).as_posix()


def main(root: Path) -> int:
    """Check the tree; returns 1 when something was found."""
    checked = findings = 0
    for path in files(root):
        checked += 1
        for finding in check_file(path, (root / path).read_text(encoding="utf-8")):
            findings += 1
            print(finding)
    print(f"{checked} files: {findings} finding(s) against the folder rule and budgets")
    return 1 if findings or checked == 0 else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]))
