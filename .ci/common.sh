# What the checks have in common: a copy of the checkout without ignored files, as a newcomer would have it, and the
# README's own test command. Sourced by `run` and `oldest`. Needs bash, git, tar and python3; TMPDIR needs room for one
# environment with torch (several GB).
set -euo pipefail

say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }
run() { say "$*"; "$@"; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Tests that need the real data look beside the checkout unless told otherwise, and the copy is elsewhere.
if [[ -z ${AMP_PLUGIN_DATA_ROOT:-} && -d $root/../shared/data ]]; then
  AMP_PLUGIN_DATA_ROOT=$(cd "$root/../shared/data" && pwd)
  export AMP_PLUGIN_DATA_ROOT
fi
# No test may reach the network or lean on what a cache happens to hold.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 HF_HOME="$work/hf-home"

say "copy the checkout to $work/checkout"
mkdir "$work/checkout"
cd "$root"
git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -xf - -C "$work/checkout"
cd "$work/checkout"

test_command=$(awk '
  /^<!-- test-command -->$/ { marked = 1; next }
  marked && /^```/          { if (fenced) exit; fenced = 1; next }
  fenced                    { print }
' README.md)
if [[ -z $test_command ]]; then
  echo "error: README.md has no fenced block under the line '<!-- test-command -->'" >&2
  exit 1
fi
