#!/usr/bin/env bash
# Sets up everything the scripts need: a virtual environment (the active one, or .venv) with the packages of
# requirements.txt and this project itself. Running it again is quick and harmless.
# FFmpeg need not be installed: PyAV's wheels bring their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -n "${VIRTUAL_ENV:-}" ]; then
  python="$VIRTUAL_ENV/bin/python"
else
  python=.venv/bin/python
  if [ ! -x "$python" ]; then
    base=""
    for candidate in python3 python3.13 python3.12 python3.11; do
      if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    [ -n "$base" ] || { echo "dependencies.sh: Python 3.11 or newer is needed (PyTorch 2.15 and PyAV 18 have no wheels for older ones); install it and run this again" >&2; exit 1; }
    if ! "$base" -m venv .venv 2>/dev/null; then
      rm -rf .venv
      # Debian and Ubuntu split venv off.
      if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }; then
        root=""; [ "$(id -u)" = 0 ] || root=sudo
        $root apt-get update -qq && $root apt-get install -y -qq python3-venv
        "$base" -m venv .venv
      else
        echo "dependencies.sh: '$base -m venv' does not work; install python3-venv and run this again" >&2
        exit 1
      fi
    fi
  fi
fi

# What was installed last time, by the content of the files that decide it.
stamp="$(dirname "$python")/../.extraction-installed"
wanted="$(cat requirements.txt pyproject.toml | cksum) $("$python" --version) $PWD"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi
echo "setting up (a few GB the first time) ..."
pip=("$python" -m pip install --quiet --disable-pip-version-check)
# uv unpacks and links files in parallel, in a fraction of pip's time. It does not read pip's configuration, so it is told
# where pip would look; where it fails all the same, pip does the work.
while IFS="=" read -r key value; do
  value=${value#\'} value=${value%\'}
  case $key in
    *.index-url) export UV_DEFAULT_INDEX="$value" ;;
    *.extra-index-url) export UV_INDEX="$value" ;;
    *.find-links) export UV_FIND_LINKS="${value// /,}" ;;
    *.cert) export SSL_CERT_FILE="$value" ;;
  esac
done < <("$python" -m pip config list)
export UV_INDEX_STRATEGY=unsafe-best-match  # of several indexes the best version, as pip takes it
"${pip[@]}" uv==0.13.9 && "$python" -m uv pip install --quiet --python "$python" -r requirements.txt || "${pip[@]}" -r requirements.txt
"${pip[@]}" --no-deps -e .
echo "$wanted" >"$stamp"
echo "ready"
