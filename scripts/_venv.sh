# Sourced by the scripts next to it.

# make_venv FOLDER: makes a virtual environment there unless there is one, and sets PYTHON to its interpreter.
make_venv() {
  if [[ ! -x "$1/bin/python" ]]; then
    local candidate found=""
    for candidate in python3.11 python3.12 python3.13 python3; do
      if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        found="$candidate"
        break
      fi
    done
    if [[ -z "$found" ]]; then
      echo "Python 3.11 or later is needed, and none of python3.11, python3.12, python3.13 and python3 is" >&2
      return 1
    fi
    "$found" -m venv "$1"
  fi
  PYTHON="$1/bin/python"
}
