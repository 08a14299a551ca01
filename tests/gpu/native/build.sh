#!/usr/bin/env bash
# Builds the native programs of tests/gpu into build/gpu with device code embedded: tests/gpu/native/build.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DPDXFER_PYTHON=OFF -DPDXFER_TESTS=OFF \
  -DPDXFER_DEVICE_CODE=required >/dev/null
cmake --build build/gpu --target pdxfer_native
for program in two_gpus copy_rates; do
  "${CXX:-g++}" -std=c++20 -O2 -Icsrc "tests/gpu/native/$program.cpp" build/gpu/libpdxfer_native.a -ldl -lpthread \
    -static-libstdc++ -static-libgcc -o "build/gpu/$program"
done
