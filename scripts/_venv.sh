# Makes and mends the checkout's .venv; sourced by scripts/sdcli and scripts/test, which set `root` first.
#
# Environment: SDCLI_PYTHON        the Python 3.11 to 3.13 to use (default: the first found on PATH)
#              SDCLI_TORCH_INDEX   a further package index to take torch from, such as the CPU builds at
#                                  https://download.pytorch.org/whl/cpu (pip's own settings hold as well)

venv=${root:?}/.venv
python=$venv/bin/python

# ensure_venv run|dev: after this, $python has the packages of pyproject.toml (with the dev extra for `dev`).
# All talk goes to stderr. What was done is stamped last, so a set-up that was killed is taken up again.
ensure_venv() {
    is_ready "$1" && return
    local found
    found=$(find_python) || fail "found no Python 3.11, 3.12 or 3.13 with venv (on Debian and Ubuntu:" \
        "apt install python3 python3-venv); SDCLI_PYTHON=/path/to/python3 names one"
    { exec 9>"$root/.venv.lock"; } 2>/dev/null || fail "cannot write in $root, where .venv has to be made"
    trap 'say "the set-up was interrupted; the next call takes it up again"; exit 130' INT TERM
    lock "$found"
    is_ready "$1" || set_up "$1" "$found" # another process may have done it while this one waited
    trap - INT TERM
    exec 9>&-
}

is_ready() {
    [ -x "$python" ] && [ -x "$venv/bin/sdcli" ] && [ "$(cat "$venv/.sdcli-stamp-$1" 2>/dev/null)" = "$(stamp)" ]
}

# What the set-up depends on: the two files, where the checkout is, and the Python that the links in .venv end at.
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
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null && right_version "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

right_version() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

# One set-up at a time: Python locks the open file 9, and the lock lasts until this shell closes it or dies.
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

# Bring .venv up to date in place where that works, else make it anew.
set_up() {
    rm -f "$venv"/.sdcli-stamp-*
    if ! { is_sound && install "$1" && works "$1"; }; then
        if is_sound && works run; then # the network is away, say: what is there is worth keeping
            fail "could not bring $venv up to date (see above); the next call tries again, rm -r .venv starts anew"
        fi
        say "making $venv with $("$2" -V): a few minutes, once"
        rm -rf "$venv"
        "$2" -m venv "$venv" >&2 || fail "could not make $venv (see above)"
        { install "$1" && works "$1"; } || fail "could not install the packages (see above); the next call tries again"
    fi
    stamp >"$venv/.sdcli-stamp-run"
    [ "$1" = run ] || stamp >"$venv/.sdcli-stamp-$1"
}

# Whether .venv was made here, by a Python that is still there and of a right version.
is_sound() {
    [ -x "$python" ] && [[ $(grep '^command = ' "$venv/pyvenv.cfg" 2>/dev/null) == *" -m venv $venv" ]] &&
        right_version "$python" && "$python" -c 'import pip' 2>/dev/null
}

install() (
    target=.
    [ "$1" = run ] || target=".[$1]"
    pip=("$python" -m pip install --disable-pip-version-check)
    [ -t 2 ] || pip+=(--quiet)
    say "installing the packages into $venv"
    cd "$root" || exit
    export PIP_USER=0
    # torch first, so that a further index serves torch alone
    "${pip[@]}" "$(grep '^torch==' constraints.txt)" -c constraints.txt \
        ${SDCLI_TORCH_INDEX:+--extra-index-url "$SDCLI_TORCH_INDEX"} >&2 &&
        "${pip[@]}" -e "$target" -c constraints.txt >&2
)

works() {
    local modules="torch, diffusers, transformers, accelerate, tokenizers, pydantic, typer, rich, PIL, yaml"
    [ "$1" = run ] || modules="$modules, pytest, xdist, hypothesis, mypy, ruff"
    "$python" -c "import $modules" >&2
}

say() { echo "sdcli: $*" >&2; }

fail() {
    say "$@"
    exit 1
}
