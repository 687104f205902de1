# Creates and updates the checkout's .venv; sourced by scripts/sdcli and scripts/test, which set `root` first.
#
# Environment: SDCLI_PYTHON        path of Python 3.11 to 3.13 (default: the first one found on PATH)
#              SDCLI_TORCH_INDEX   an extra package index for torch, such as the CPU builds at
#                                  https://download.pytorch.org/whl/cpu (pip's own settings also apply)

venv=${root:?}/.venv
python=$venv/bin/python

# ensure_venv run|dev: installs the packages of pyproject.toml for $python (with the dev extra for `dev`).
# All messages go to stderr. A stamp file is written last, so the next call repeats a set-up that was killed.
ensure_venv() {
    is_ready "$1" && return
    local found
    found=$(find_python) || fail "found no Python 3.11, 3.12 or 3.13 with venv (on Debian and Ubuntu:" \
        "apt install python3 python3-venv); SDCLI_PYTHON=/path/to/python3 selects another"
    { exec 9>"$root/.venv.lock"; } 2>/dev/null || fail "cannot write to $root, where .venv is created"
    trap 'report "the set-up was interrupted; the next call continues it"; exit 130' INT TERM
    lock "$found"
    is_ready "$1" || set_up "$1" "$found" # another process may have done it while this one waited
    trap - INT TERM
    exec 9>&-
}

is_ready() {
    [ -x "$python" ] && [ -x "$venv/bin/sdcli" ] && [ "$(cat "$venv/.sdcli-stamp-$1" 2>/dev/null)" = "$(stamp)" ]
}

# The inputs of the set-up: two files, the location of the checkout, and the Python behind the links in .venv.
stamp() {
    local sum=sha256sum
    command -v sha256sum >/dev/null || sum="shasum -a 256"
    $sum <"$root/pyproject.toml"
    $sum <"$root/constraints.txt"
    echo "$root"
    readlink -f "$python"
}

find_python() {
    local candidate
    for candidate in ${SDCLI_PYTHON:+"$SDCLI_PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null && is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

# One set-up at a time: Python locks file descriptor 9; the lock is released when this shell closes it or exits.
lock() {
    "$1" - <<'PYTHON'
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("sdcli: another process is setting up .venv; waiting for it", file=sys.stderr, flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
PYTHON
}

# Updates .venv in place if possible, else creates it again.
set_up() {
    rm -f "$venv"/.sdcli-stamp-*
    if ! { is_sound && install "$1" && works "$1"; }; then
        if is_sound && works run; then # no network, for instance: keep the working .venv
            fail "could not bring $venv up to date (see above); the next call tries again, after rm -r .venv from scratch"
        fi
        report "creating $venv with $("$2" -V); this takes a few minutes, once"
        rm -rf "$venv"
        "$2" -m venv "$venv" >&2 || fail "could not create $venv (see above)"
        { install "$1" && works "$1"; } || fail "could not install the packages (see above); the next call tries again"
    fi
    stamp >"$venv/.sdcli-stamp-run"
    [ "$1" = run ] || stamp >"$venv/.sdcli-stamp-$1"
}

# Whether .venv was created here, by a supported Python that still exists.
is_sound() {
    [ -x "$python" ] && [[ $(grep '^command = ' "$venv/pyvenv.cfg" 2>/dev/null) == *" -m venv $venv" ]] &&
        is_supported "$python" && "$python" -c 'import pip' 2>/dev/null
}

install() (
    target=.
    [ "$1" = run ] || target=".[$1]"
    pip=("$python" -m pip install --disable-pip-version-check)
    [ -t 2 ] || pip+=(--quiet)
    report "installing the packages into $venv"
    cd "$root" || exit
    export PIP_USER=0
    # torch first, so that the extra index serves only torch
    "${pip[@]}" "$(grep '^torch==' constraints.txt)" -c constraints.txt \
        ${SDCLI_TORCH_INDEX:+--extra-index-url "$SDCLI_TORCH_INDEX"} >&2 &&
        "${pip[@]}" -e "$target" -c constraints.txt >&2
)

works() {
    local modules="torch, diffusers, transformers, accelerate, tokenizers, pydantic, typer, rich, PIL, yaml"
    [ "$1" = run ] || modules="$modules, pytest, xdist, hypothesis, mypy, ruff"
    "$python" -c "import $modules" >&2
}

report() { echo "sdcli: $*" >&2; }

fail() {
    report "$@"
    exit 1
}
