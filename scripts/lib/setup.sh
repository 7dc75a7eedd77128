# shellcheck shell=bash
# What quickstart, test and check have in common (sourced): CRIU, a Python and the checkout's own .venv.
# Every step looks first and does nothing when it was done before.

root=$(dirname "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")")
venv=$root/.venv
# shellcheck source=scripts/lib/apt.sh
source "$root/scripts/lib/apt.sh"

# What crcli itself calls or needs beside Python; the tests' own programs stand in tests/*/apt.txt.
readonly NEEDED_PACKAGES=(ca-certificates iproute2 nftables)

# setup_machine: the packages that crcli needs are installed.
setup_machine() { apt_need "${NEEDED_PACKAGES[@]}"; }

# setup_criu: a CRIU that works here is in place and its pycriu can be imported in .venv.
setup_criu() { "$root/scripts/install-criu" --pycriu "$venv"; }

# setup_venv [EXTRA [REQUIREMENTS_FILE...]]: .venv has crcli of this checkout (editable) with that extra of
# pyproject.toml and with what the files ask for, compiled to bytecode.
setup_venv() {
    local extras=${1:-} file stamp wanted=()
    local -A stamps=()
    shift || true
    exec 8<"$root"
    flock 8   # two scripts at once in one checkout
    venv_works || new_venv
    [[ ! -e /dev/nvidiactl ]] || extras=${extras:+$extras,}gpu
    # compat: a plain line in a .pth file; the finder that setuptools makes else costs every command 10 ms.
    want_from "$root/pyproject.toml" -e "$root${extras:+[$extras]}" --config-settings editable_mode=compat
    for file; do want_from "$file" -r "$file"; done
    if ((${#wanted[@]})); then
        say "installing Python packages: ${wanted[*]}"
        # pip would compile one file after another.
        "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check "${wanted[@]}"
        bytecode "$venv"/lib/python3*/site-packages
        for stamp in "${!stamps[@]}"; do printf '%s\n' "${stamps[$stamp]}" >"$stamp"; done
    fi
    bytecode "$root/crcli"
    exec 8<&-
}

# want_from FILE PIP_ARGUMENTS...: `wanted` has these, unless pip has done this, with this Python, since FILE last
# changed. A stamp in .venv, one for each way of calling, remembers from what: `stamps` has it, to be written then.
want_from() {
    local stamp want
    stamp=$venv/.set-up-$(tr -c 'a-z0-9\n' - <<<"${*:2}")
    want=$("$venv/bin/python" -VV; cat "$1")
    [[ $(cat "$stamp" 2>/dev/null) != "$want" ]] || return 0
    rm -f "$stamp"
    wanted+=("${@:2}")
    stamps[$stamp]=$want
}

# Without bytecode every start of crcli would compile again what it imports. All processors compile; where they
# cannot (no /dev/shm), one does.
bytecode() {
    local compile=(env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -m compileall -q)
    "${compile[@]}" -j 0 "$@" >/dev/null 2>&1 || "${compile[@]}" "$@" >/dev/null || true
}

venv_works() { [[ -x $venv/bin/python ]] && "$venv/bin/python" -c 'import pip' 2>/dev/null; }

new_venv() {
    local python
    python=$(found_python) || { python_packages && python=$(found_python); } ||
        die "no Python 3.11 or newer with venv: install one and put it on PATH as python3"
    say "making ${venv#"$PWD/"} with $("$python" -V)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
}

# found_python: print a Python that is new enough and can make virtual environments.
found_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        printf '%s\n' "$name"
        return
    done
    return 1
}

# python_packages: the distribution's Python is installed, its default one if that is new enough.
python_packages() {
    local default
    is_root || return 1
    apt_update
    default=$(apt_candidate python3)
    if dpkg --compare-versions "${default:-0}" ge 3.11; then
        apt_need python3 python3-venv
    else
        apt_need 'python3.13|python3.12|python3.11' 'python3.13-venv|python3.12-venv|python3.11-venv'
    fi
}
