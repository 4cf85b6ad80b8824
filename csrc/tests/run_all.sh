#!/bin/sh
# Builds and runs the kernel tests: optimized with every compiler found, then under the sanitizers.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
run() {
    name=$1 compiler=$2 sanitize=$3
    echo "== $name"
    cmake -S "$root/csrc" -B "$root/build/$name" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" \
        -DPENSTOCK_SANITIZE="$sanitize" -DPENSTOCK_WERROR=ON >/dev/null
    cmake --build "$root/build/$name" --target native_tests penstock_native
    (cd "$root/build/$name" && ctest --output-on-failure)
}
run gcc g++ ""
if command -v clang++ >/dev/null; then run clang clang++ ""; else echo "== clang: not here, skipped"; fi
run address-undefined g++ "address,undefined"
run thread g++ "thread"
