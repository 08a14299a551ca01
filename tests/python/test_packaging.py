"""The package as it is installed, the settings' documentation, and that the checks of folders and budgets can fail."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pdxfer
from pdxfer import _core

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """A script of tests/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_import_is_quick_and_brings_in_no_gpu_library() -> None:
    run = subprocess.run([sys.executable, str(ROOT / "tests/check_import.py")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_version_is_one() -> None:
    assert pdxfer.__version__ == importlib.metadata.version("pdxfer") == _core.build_info()["version"]


def test_entry_points() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="pdxfer")
    assert [script.value for script in scripts] == ["pdxfer.cli:main"]
    plugins = importlib.metadata.entry_points(group="sglang.srt.plugins", name="pdxfer")
    assert [plugin.value for plugin in plugins] == ["pdxfer.sglang.register:register"]


def test_typed() -> None:
    folder = Path(pdxfer.__file__).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "_core.pyi").is_file()


def test_module_needs_glibc_only() -> None:
    findings, facts = load("tests/check_wheel.py").check_module(Path(_core.__file__))
    # A build on a newer distribution than CI's may need its glibc; a wheel for others may not, and CI checks that.
    assert [text for text in findings if not text.startswith("needs glibc")] == [], facts


def test_wheel_check_finds_a_foreign_library(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("int ibv_fork_init(void); int PyInit_bad(void) { return ibv_fork_init(); }\n")
    module = tmp_path / "bad.so"
    subprocess.run(["c++", "-x", "c", "-shared", "-fPIC", "-o", str(module), str(source)], check=True)
    findings, _ = load("tests/check_wheel.py").check_module(module)
    assert "undefined symbol ibv_fork_init: load it at run time" in findings


# ---- docs/configuration.md and csrc/core/config.hpp ----


def documented() -> dict[str, tuple[str, str]]:
    """{field: (variable, default)} of the table in docs/configuration.md."""
    rows = re.findall(
        r"^\| `(\w+)` \| `(PDXFER_\w+)` \| (.*?) \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE
    )
    return {field: (variable, default.strip("`")) for field, variable, default in rows}


def test_every_setting_is_documented_with_its_default() -> None:
    settings = dict(_core.Config(environment=False).items())
    table = documented()
    assert list(table) == list(settings), "the table has every field of Config, in its order"
    for field, (variable, default) in table.items():
        assert variable == "PDXFER_" + field.upper()
        assert default.replace("(empty)", "") == settings[field], field


def test_documented_choices_are_accepted_and_others_are_not() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `shm_path`"))
    choices = re.findall(r"`(\w+)`", row.split("|")[4])
    assert choices == ["auto", "map", "cma", "staging"]
    for choice in choices:
        pdxfer.Config(environment=False, shm_path=choice)
    with pytest.raises(pdxfer.InvalidError):
        pdxfer.Config(environment=False, shm_path="other")


# ---- tests/check_folders.py ----

HEAD = "// What it is for.\n"


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("csrc/plan/a.cpp", '#include "pack/b.hpp"\n', "plan stands above pack"),
        ("csrc/pack/a.cpp", '#include "plan/b.hpp"\n', "never include one another"),
        ("csrc/transport/tcp/a.cpp", '#include "pack/b.hpp"\n', "never include one another"),
        ("csrc/transport/tcp/a.cpp", '#include "transport/shm/b.hpp"\n', "may not include another transport"),
        ("csrc/core/a.cpp", '#include "engine/b.hpp"\n', "core stands above engine"),
        ("csrc/core/a.cpp", '#include "types.hpp"\n', "not written from csrc/"),
        ("csrc/other/a.cpp", "", "not one of the folders"),
        ("csrc/core/string_util.cpp", "", "the name says nothing"),
        ("csrc/sys/a.cpp", 'const char* v = getenv("X");\n', "reads the environment"),
        ("csrc/core/a.hpp", "\n" * 200, "201 lines, at most 200"),
        ("csrc/core/a.cpp", "\n" * 500, "501 lines, at most 500"),
        ("csrc/core/a.cpp", "int f(int x) {\n" + "  x++;\n" * 60 + "}\n", "function of 62 lines"),
        ("csrc/core/a.cpp", "A::A(int x) : x_(x), y_{x} {\n" + "  x++;\n" * 60 + "}\n", "function of 62 lines"),
        (
            "csrc/core/a.hpp",
            "class I {\n" + "  virtual void f() = 0;\n" * 9 + "};\n",
            "class I has 9 virtual functions",
        ),
    ],
)
def test_each_rule_of_the_tree_can_fail(path: str, text: str, says: str) -> None:
    findings = list(load("tests/check_folders.py").check_file(path, HEAD + text))
    assert any(says in finding for finding in findings), findings


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("csrc/transport/tcp/a.cpp", '#include "transport/stream/b.hpp"\n#include "sys/fd.hpp"\n#include <vector>\n'),
        ("csrc/engine/a.cpp", '#include "plan/a.hpp"\n#include "pack/a.hpp"\n#include "transport/transport.hpp"\n'),
        ("csrc/core/config.cpp", 'const char* v = getenv("X");\n'),
        ("csrc/core/a.cpp", "int f(int x) {\n" + "  x++;\n" * 58 + "}\n"),
        ("csrc/core/a.cpp", "namespace a {\n" + "int f(int x) { return x; }\n" * 90 + "}\n"),
        ("csrc/core/a.cpp", "struct S {\n" + "  int f() { return 0; }\n" * 90 + "};\n"),
        ("csrc/core/a.cpp", "constexpr int kTable[] = {\n" + "  f(1),\n" * 90 + "};\n"),
        ("csrc/core/a.cpp", "int f() {\n  return g(\"{{{{\", '{'); // {{{\n}\n" + "int x;\n" * 90),
        ("csrc/core/a.hpp", "class I {\n  virtual ~I() = default;\n" + "  virtual void f() = 0;\n" * 8 + "};\n"),
    ],
)
def test_what_is_allowed_passes(path: str, text: str) -> None:
    assert list(load("tests/check_folders.py").check_file(path, HEAD + text)) == []


def test_python_budgets_leave_docstrings_out() -> None:
    check = load("tests/check_folders.py").check_file
    long = "def f() -> None:\n" + "    x = 1\n" * 60
    assert any("function f of 61 lines" in finding for finding in check("tests/a.py", '"""What."""\n' + long))
    documented_function = 'def f() -> None:\n    """\n' + "    word\n" * 80 + '    """\n'
    assert list(check("tests/a.py", '"""What."""\n' + documented_function)) == []
