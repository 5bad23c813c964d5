#!/usr/bin/env bash
# The gate in any CI system: judges a bundle or a verify.json, leaves a folder of reports, ends with the gate's exit code.
#
#   ci/gate.sh REPORT [OUTPUT_FOLDER]        UWM_POLICY=strict UWM_BASELINE=ci/baseline ci/gate.sh dist/demo
#   UWM_PUBLIC_KEY=key.pub UWM_MIN_BUNDLE_VERSION=3 ci/gate.sh dist/demo
#
# Exit codes: 0 pass, 3 failed, 4 inconclusive; 2, 5 and 6 mean that nothing was judged (docs/reference/cli.md).
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: ci/gate.sh REPORT [OUTPUT_FOLDER]" >&2
  exit 2
fi
report=$1
out=${2:-gate-reports}
if ! mkdir -p "$out"; then
  echo "gate: $out cannot be made, so there is no place for the reports" >&2
  exit 2
fi

options=(--policy "${UWM_POLICY:-default}")
if [ -n "${UWM_BASELINE:-}" ]; then
  options+=(--baseline "$UWM_BASELINE")
fi
if [ -n "${UWM_PUBLIC_KEY:-}" ]; then
  options+=(--public-key "$UWM_PUBLIC_KEY")
fi
if [ "${UWM_MIN_BUNDLE_VERSION:-0}" != 0 ]; then
  options+=(--min-bundle-version "$UWM_MIN_BUNDLE_VERSION")
fi

code=0
uwm-deploy gate "$report" "${options[@]}" \
  --junit "$out/junit.xml" --markdown "$out/gate.md" --sarif "$out/gate.sarif" --gitlab "$out" || code=$?

case $code in
  0) echo "gate: $(sed -n '1s/^### verdict: //p' "$out/gate.md")" ;;
  3) echo "gate: FAILED, see $out/gate.md" >&2 ;;
  4) echo "gate: inconclusive, measure on more items; see $out/gate.md" >&2 ;;
  *) echo "gate: nothing was judged (exit code $code)" >&2 ;;
esac
exit "$code"
