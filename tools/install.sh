#!/bin/sh
# Makes $VENV and installs the project with everything: the exact versions and the very files of requirements.lock.
# uv (Astral, MIT/Apache-2.0) installs in seconds what takes pip minutes; where it can't, pip does it. Neither takes a
# file whose hash is not in the lock. `make lock` writes that anew, at the versions of constraints.txt.
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
pip="$venv/bin/python -m pip --disable-pip-version-check"
first="$venv/uv.lock"
awk '/^uv==/ { on = 1 } on { print } on && !/\\$/ { exit }' requirements.lock > "$first"
if $pip install --quiet --require-hashes -r "$first" &&
  "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --require-hashes -r requirements.lock
then
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation -e .
else
  $pip install --require-hashes -r requirements.lock
  $pip install --no-deps --no-build-isolation -e .
fi
echo "installed $("$venv/bin/abliterated" --version)"
