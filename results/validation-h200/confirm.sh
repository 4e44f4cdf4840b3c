#!/usr/bin/env bash
# Every line that a GPU has to show, in parts of at most six minutes. What a part has finished lies in OUT/PART, also if
# it is killed.
#
#   results/validation-h200/confirm.sh OUT [MACHINE [PART ...]]
#
# MACHINE: auto (default), cuda, or cpu for a trial. PART: tests, goals, batch-1, batch-8, deepseek; default all, in this
# order. In the environment: EVAL, the eval recording of gpt-oss-20b, for goals; MINUTES of each part (default 5.5), which
# ends at LIMIT seconds at the latest (default 360); WORDS, further words of each validation; PYTHON (default python).
# Where mypy and a C compiler are, the core is compiled first (docs/installation.md), which takes a minute.
# Exit code 1 if a part was not shown, or broke off.
set -uo pipefail
if [ $# -lt 1 ]; then
    echo "error: no folder for the results; give one: $0 OUT [MACHINE [PART ...]]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
machine=${2:-auto}
shift $(($# < 2 ? $# : 2))
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests goals batch-1 batch-8 deepseek)
trace=${EVAL:+$(realpath "$EVAL")}
minutes=${MINUTES:-5.5}
python=${PYTHON:-python}
cd "$(dirname "$0")/../.." || exit 2
export PYTHONUNBUFFERED=1
# The host is what holds rows up, and compiled it takes little more than half; EXPERTFLOW_COMPILED=0 leaves Python.
core='import sys, expertflow.core; print(expertflow.core.described()); sys.exit(not expertflow.core.is_compiled())'
"$python" -c "$core" || [ "${EXPERTFLOW_COMPILED:-}" = 0 ] || "$python" build_backend.py
read -ra more <<<"${WORDS:-}"

validate() { # PART MODEL BATCH-SIZES [WORD ...]
    limited -m replay.validate "confirm-$1" --machine "$machine" --minutes "$minutes" --models "$2" --batch-sizes "$3" \
        --host-memory-gb 6 --out "$out/$1" "${@:4}" ${more[@]+"${more[@]}"}
}

limited() {
    timeout --kill-after=15 "${LIMIT:-360}" "$python" "$@"
}

part() {
    case $1 in
        # Kernels, events, copies and whole replays of the device itself; all of them skip on a machine without one.
        tests) limited -m pytest -q -m "gpu and not slow" tests/gpu ;;
        # Everything resident within 2.4 ms a token, LRU at 50 % within 6.2, ten repeats within 1 %.
        goals) limited -m replay.validation.goals --out "$out/goals" --machine "$machine" --minutes "$minutes" \
            --host-memory-gb 6 ${trace:+--trace "$trace"} ;;
        # Six policies, 25 and 50 %, graph and found (eager: LRU and adaptive at 50 %), and a million stamped executions.
        batch-1) validate batch-1 gpt-oss-20b 1 ;;
        batch-8) validate batch-8 gpt-oss-20b 8 --verify-executions 0 ;;
        deepseek) validate deepseek deepseek-v2-lite 1,8 --verify-executions 0 ;;
        *)
            echo "error: PART=$1 is unknown; choose from: tests, goals, batch-1, batch-8, deepseek" >&2
            return 2
            ;;
    esac
}

worst=0
told=()
for name in "${parts[@]}"; do
    mkdir -p "$out/$name"
    echo "== $name"
    part "$name" 2>&1 | tee "$out/$name/output.txt"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || worst=1
    told+=("$name: exit code $code")
    printf '%s\n' "${told[@]}" >"$out/parts.txt"
done
echo "== parts"
printf '%s\n' "${told[@]}"
exit $worst
