#!/bin/sh
# Makes $VENV and installs the project with everything, at the exact versions of constraints.txt.
# uv (Astral, MIT/Apache-2.0) installs in seconds what takes pip minutes; where it can't, pip does it.
set -eu

python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "abliterated needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Try: make PYTHON=python3.12 install" >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
  echo "no virtual environment could be made; on Debian: apt-get install python3-venv" >&2
  exit 1
}
# uv knows neither pip's certificate nor its wheel folder by itself.
if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
echo "installing into $venv (torch is large: the first time takes a few minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
"$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" -c constraints.txt -e '.[pipeline,demo,dev]' ||
  "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[pipeline,demo,dev]'
echo "installed $("$venv/bin/abliterated" --version)"
