# The same commands that CI and the README use, by short names (https://just.systems). CI itself is .ci/run.

# Everything that tests/run does: .venv, install, C++ and Python tests.
test *ARGS:
    tests/run {{ARGS}}

# Parts of CI by name, all without one: just ci format folders
ci *PARTS:
    bash .ci/run {{PARTS}}

# Rewrite sources as the formatters want them.
format:
    git ls-files -co --exclude-standard -- 'csrc/*' 'tests/*' | grep -E '\.(hpp|cpp|cu)$' | xargs clang-format -i
    ruff check --fix .
    ruff format .

# The kernel on a real GPU; needs the installed package with device code.
gpu:
    .venv/bin/python -m pytest tests/gpu -m gpu
