#!/usr/bin/env bash
# Everything that waits for a GPU, in parts of less than ten minutes, each with its own table:
#
#     bash benchmarks/gpu.sh OUT                        # all parts, one after the other
#     bash benchmarks/gpu.sh OUT train_step victims     # some of them
#     SCALE=demo bash benchmarks/gpu.sh OUT             # the same on a CPU, small: does every part run?
#
# A part that is there already is not run again: delete its file to repeat it. OUT/tables.md has all of them, with the card, the
# versions and the commit, ready for docs/performance.md. PYTHON names the interpreter; `--list` prints the parts.
set -uo pipefail
case ${1:-} in "" | --list) out=OUT ;; *) out=$(realpath -m "$1") ;; esac
case $out in *[[:space:]]*) echo "gpu.sh: $out: a folder without blanks in its path, please" >&2; exit 1 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SCALE=${SCALE:-full}
# In the order of what they are worth. Small rows on a CPU take seconds; --turns 1 is for trying, not for reading.
small=() train=(benchmarks/train_step.py) free=(benchmarks/data_free_step.py)
if [ "$SCALE" = demo ]; then
  small=(--scale demo --device cpu --steps 1 --turns 1)
  train+=("${small[@]}" --no-memory) free+=("${small[@]}" --no-memory)
fi
declare -A command=(
  [tests]="-m pytest -q -m gpu -p no:cacheprovider"
  [demo]="grey_box/swin_to_r21_kd.py --demo --out-dir $out/swin_to_r21_kd_demo"
  [train_step]="${train[*]}"
  [profile]="${train[*]} --profile"
  [kernels]="benchmarks/kernels.py ${small[*]}"
  [batch_32]="${train[*]} --batch-size 32"
  [batch_64]="${train[*]} --batch-size 64"
  [batch_128]="${train[*]} --batch-size 128"
  [not_compiled]="${train[*]} --compile off"
  [data_free_step]="${free[*]}"
  [data_free_profile]="${free[*]} --profile"
  [victims]="benchmarks/victims.py"
  [loader]="benchmarks/loader.py"
  [growth]="${train[*]} --growth --out $out/growth.png"
)
order=(tests demo train_step profile kernels batch_32 batch_64 batch_128 not_compiled data_free_step data_free_profile victims
  loader growth)
if [ "$SCALE" = demo ]; then
  command[tests]+=" --collect-only"
  command[demo]+=" --epochs 1"
  command[victims]+=" --victims demo_swin demo_movinet --repeats 1"
  command[loader]+=" --clips 8 --repeats 1 --num-workers 1 --prefetch 2"
  for batch in 32 64 128; do command[batch_$batch]="${train[*]} --batch-size $((batch / 16))"; done
fi

if [ "${1:-}" = --list ] || [ $# -eq 0 ]; then
  for part in "${order[@]}"; do echo "$part: python ${command[$part]}"; done
  [ $# -gt 0 ]; exit
fi
shift
parts=("${@:-${order[@]}}"); [ $# -gt 0 ] || parts=("${order[@]}")
for part in "${parts[@]}"; do
  [ -n "${command[$part]:-}" ] || { echo "gpu.sh: no part is called $part; there are ${order[*]}" >&2; exit 1; }
done
mkdir -p "$out"
failed=()
for part in "${parts[@]}"; do
  file=$out/$part.txt
  [ -f "$file" ] && { echo "$part: in $file already"; continue; }
  echo "== $part: python ${command[$part]}"
  begin=$SECONDS
  # shellcheck disable=SC2086  # words on purpose
  if timeout 590 "$PYTHON" ${command[$part]} >"$file.partial" 2>"$out/$part.stderr"; then
    { echo "\$ python ${command[$part]}"; cat "$file.partial"; echo "($((SECONDS - begin)) s)"; } >"$file"
    rm "$file.partial"
    tail -n 25 "$file"
  else
    echo "$part failed; its output is in $file.partial and $out/$part.stderr" >&2
    tail -n 3 "$out/$part.stderr" >&2
    failed+=("$part")
  fi
done
{
  "$PYTHON" - <<'PYTHON_END'
import platform, torch
card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {platform.machine()}"
print(f"{card}; PyTorch {torch.__version__}, Python {platform.python_version()}")
PYTHON_END
  echo "commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo +)"
  for part in "${order[@]}"; do
    [ -f "$out/$part.txt" ] && printf '\n### %s\n\n' "$part" && sed 's/^/    /' "$out/$part.txt"
  done
} >"$out/tables.md"
echo "tables: $out/tables.md"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}; the same command tries these again" >&2; exit 1; }
