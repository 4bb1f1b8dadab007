# Sourced by the other scripts: makes (or reuses) a virtual environment with the wanted extras and puts it first on PATH.
#   PYTHON  the interpreter to build it with   (default: the newest of python3.13, 3.12, 3.11, python3 that is >= 3.11)
#   VENV    where it lives                     (default: .venv)
#   EXTRAS  what to install, e.g. "test,parity" (default: none)
# The environment is reused while pyproject.toml and the interpreter stay the same.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$repository/.venv}
EXTRAS=${EXTRAS:-}

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || { echo "PYTHON=$PYTHON is not a Python >= 3.11 with venv" >&2; exit 1; }
else
    for candidate in python3 python3.11 python3.12 python3.13; do
        if usable "$candidate"; then PYTHON=$candidate; break; fi
    done
    [ -n "${PYTHON:-}" ] || { echo "No Python >= 3.11 with venv found; set PYTHON=/path/to/python" >&2; exit 1; }
fi

# Lines of the stamp: what the environment is made from, then the extras it has. An extra that is missing is added.
made_from="$("$PYTHON" -VV) $(cksum < "$repository/pyproject.toml")"
if [ ! -x "$VENV/bin/python" ] || [ "$(head -n 1 "$VENV/.stamp" 2>/dev/null)" != "$made_from" ]; then
    echo "== environment: $VENV ($("$PYTHON" -V), extras: ${EXTRAS:-none})"
    rm -rf "$VENV"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    "$VENV/bin/python" -m pip install --quiet --editable "$repository${EXTRAS:+[$EXTRAS]}"
    printf '%s\n' "$made_from" ${EXTRAS//,/ } > "$VENV/.stamp"
fi
for extra in ${EXTRAS//,/ }; do
    if ! tail -n +2 "$VENV/.stamp" | grep -qx "$extra"; then
        echo "== environment: adding the extra $extra"
        "$VENV/bin/python" -m pip install --quiet --editable "$repository[$extra]"
        echo "$extra" >> "$VENV/.stamp"
    fi
done
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
