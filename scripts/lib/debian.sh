# shellcheck shell=bash
# Packages of other Debian suites than this machine's, for the scripts beside it (sourced, after apt.sh): fetched
# and proven by their signatures, never installed. The machine's own sources stay as they are.
#
# The caller sets `work` to an empty folder of its own, readable for everybody.

work=''      # where all of it is done
there=()     # options that make apt know one other source only, see lists_of
keyring=''   # that proves it

# each_source SUITES COMMAND...: run the command for every mirror and suite, in this order, with $mirror and $suite
# set and "${there[@]}" as lists_of leaves it, until it succeeds. Lists that are past their date, because a mirror
# lags or this machine's clock is ahead, come last: what Debian signed is Debian's, only perhaps not its newest.
each_source() {
    local mirror suite late=() one
    for mirror in $(debian_mirrors); do
        for suite in $1; do
            if source_of "$mirror" "$suite"; then
                "${@:2}" && return
            elif grep -q 'Release file .* is expired' "$work/log"; then
                late+=("$mirror $suite")
            fi
        done
    done
    for one in "${late[@]}"; do
        read -r mirror suite <<<"$one"
        say "nothing newer helps: taking Debian $suite as it was, its signature is right"
        source_of "$mirror" "$suite" -o Acquire::Check-Valid-Until=false && "${@:2}" && return
    done
    return 1
}

# debian_mirrors: print the addresses that may serve other Debian suites, likeliest first. A Debian machine's
# own sources name one (whatever their format: apt itself is asked); elsewhere debootstrap knows the default.
debian_mirrors() {
    local id codename
    if [[ -n ${CRCLI_DEBIAN_MIRROR:-} ]]; then
        printf '%s\n' "$CRCLI_DEBIAN_MIRROR"
        return
    fi
    id=$(. /etc/os-release && printf %s "${ID:-}")
    codename=$(. /etc/os-release && printf %s "${VERSION_CODENAME:-}")
    if [[ $id == debian ]]; then
        # shellcheck disable=SC2016
        apt-get indextargets --format '$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)' 'Created-By: Packages' |
            mirrors_among "$codename"
    else
        apt_download_here debootstrap
        sed -n 's/^DEF_MIRROR="\(.*\)"$/\1/p' "$work"/here/usr/sbin/debootstrap
    fi
}

# mirrors_among CODENAME: of apt's index targets on stdin, print the mirrors that carry the release itself.
# Others publish under Debian's suite names too, so those that call themselves Debian come first.
mirrors_among() {
    awk -F'|' -v codename="$1" '
        $3 == "main" && ($2 == codename || $2 ~ /^(stable|oldstable|testing|unstable|sid)$/) && !seen[$1]++ {
            if ($4 == "Debian") print $1; else others = others $1 "\n"
        }
        END { printf "%s", others }'
}

# apt_download_here PACKAGE: a package of this distribution lies unpacked in $work/here, not installed.
apt_download_here() {
    mkdir -p "$work/here"
    apt_update
    (cd "$work/here" && apt-get -qq -o APT::Sandbox::User=root download "$1" >&2 && dpkg -x "$1"_*.deb .)
}

# source_of MIRROR SUITE [OPTION...]: "${there[@]}" makes apt know this one source, its signature checked.
source_of() {
    local stone
    [[ -n $keyring ]] || keyring=$(found_keyring)
    [[ -n $keyring ]] || { apt_need debian-archive-keyring; keyring=$(found_keyring); }
    lists_of "$@" && return
    # An older distribution's keyring does not know the newest archive keys. Each Debian release is signed
    # with its predecessor's key too, so a release that the keyring can prove hands us a newer keyring.
    if grep -q NO_PUBKEY "$work/log"; then
        for stone in oldoldstable oldstable stable; do
            newer_keyring "$1" "$stone" && lists_of "$@" && return
        done
    fi
    say "Debian $2 cannot be read: $(grep -m1 -E '^[EW]:' "$work/log" || echo 'no reason given')"
    return 1
}

# newer_keyring MIRROR SUITE: $keyring is the one that this suite ships, if the present one proves the suite.
newer_keyring() {
    lists_of "$1" "$2" || return 1
    fetched_there debian-archive-keyring || return 1
    say "taking newer archive keys from Debian $2"
    mkdir -p "$work/keyring"
    dpkg -x "$work"/debs/*.deb "$work/keyring"
    keyring=$(found_keyring "$work/keyring")
}

# found_keyring [ROOT]: print where Debian's archive keys are.
found_keyring() {
    local name
    for name in pgp gpg; do
        [[ -r ${1:-}/usr/share/keyrings/debian-archive-keyring.$name ]] || continue
        printf '%s\n' "${1:-}/usr/share/keyrings/debian-archive-keyring.$name"
        return
    done
}

# lists_of MIRROR SUITE [OPTION...]: its package lists are here, proven by $keyring, and "${there[@]}" makes apt use
# them, with these options of apt's.
lists_of() {
    rm -rf "$work/apt"
    mkdir -p "$work"/apt/{sources,lists/partial,cache/archives/partial}
    : >"$work/apt/status"
    cat >"$work/apt/sources/debian.sources" <<STANZA
Types: deb
URIs: $1
Suites: $2
Components: main
Architectures: $(dpkg --print-architecture)
Targets: Packages
Signed-By: $keyring
STANZA
    # The machine's settings (proxies, certificates) hold, but none of its sources, lists, pins or packages.
    there=(
        -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/apt/sources"
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
        -o Dir::State::Lists="$work/apt/lists" -o Dir::State::status="$work/apt/status"
        -o Dir::Cache="$work/apt/cache" -o Dir::Cache::pkgcache=packages.bin -o Dir::Cache::srcpkgcache=
        -o Acquire::Languages=none -o Acquire::PDiffs=false -o Acquire::Retries=3 "${@:3}"
    )
    LC_ALL=C apt-get -q "${there[@]}" -o APT::Update::Error-Mode=any update >"$work/log" 2>&1
}

# fetched_there PACKAGE...: their files lie in $work/debs, as that source has them.
fetched_there() {
    rm -rf "$work/debs"
    mkdir "$work/debs"
    chown _apt "$work/debs" 2>/dev/null || true
    (cd "$work/debs" && apt-get -q "${there[@]}" download "$@") >"$work/log" 2>&1 && return
    tail -n 5 "$work/log" >&2
    return 1
}
