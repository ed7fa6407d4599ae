# Sourced by the launchers in this folder: POSIX sh. Expects $self, the real path of the launcher.
#
# launch PROFILE PROGRAM [ARG...] runs PROGRAM in the repository's .venv, which is made or brought up to date first.
# PROFILE is "run" (the package, its server and the demo model), "report" (that and matplotlib), "optimize" (that and
# torch) or "dev" (that and the test tools). While nothing has changed since the last set-up this costs a few file stats; otherwise
# _setup.py does the work. stdin and stdout are PROGRAM's alone.

root=$(CDPATH='' cd -- "${self%/*}/.." && pwd -P) || exit 1

launch() {
    stamp=$root/.venv/acd-setup-$1
    where=
    { IFS= read -r where <"$stamp"; } 2>/dev/null # the stamp's first line: the path the environment was made for
    if ! { [ "$where" = "$root" ] && [ -x "$root/.venv/bin/python" ]; } ||
        [ "$root/pyproject.toml" -nt "$stamp" ] || [ "$root/bin/constraints.txt" -nt "$stamp" ]; then
        find_python
        exec "$python" -I "$root/bin/_setup.py" "$python" "$root" "$@"
    fi
    shift
    exec "$@"
}

# Sets $python: $PYTHON if given, else the first that is new enough and can make a virtual environment.
find_python() {
    set -- python3 python3.13 python3.12 python3.11 python3.14 python
    [ -z "$PYTHON" ] || set -- "$PYTHON"
    seen=
    for python; do
        python=$(command -v "$python") || continue
        found=$("$python" -I -c '
import sys
if sys.version_info < (3, 11): sys.exit("is " + sys.version.split()[0])
try: import ensurepip, venv
except ImportError: sys.exit("has no venv module (Debian, Ubuntu: apt install python3-venv)")
' </dev/null 2>&1 >/dev/null) && return
        seen="$seen
  $python ${found##*
}"
    done
    echo "acd-local needs Python 3.11 or newer to set itself up; PYTHON=/path/to/python chooses one. Found:${seen:- none}" >&2
    exit 1
}
