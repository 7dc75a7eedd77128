# shellcheck shell=bash
# Debian packages, for the scripts beside it (sourced): installed when missing, and no service started by it.

# A root shell made by plain `su` lacks these, and dpkg refuses to work without them.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$@"; exit 1; }
is_root() { [[ $(id -u) == 0 ]]; }

# apt_need "PACKAGE" "FIRST|SECOND" ...: each is installed, or one of its alternatives is. A package that this
# release does not have is said and passed over. Fails when something is missing and cannot be installed.
apt_need() {
    local wanted missing=() chosen=() pick
    for wanted; do apt_has "$wanted" || missing+=("$wanted"); done
    ((${#missing[@]})) || return 0
    is_root || { say "missing, and only root can install it: ${missing[*]}"; return 1; }
    apt_update
    for wanted in "${missing[@]}"; do
        if pick=$(apt_pick "$wanted"); then chosen+=("$pick"); else say "no package $wanted in this release"; fi
    done
    ((${#chosen[@]})) || return 0
    say "installing ${chosen[*]}"
    apt_quietly apt-get install -y --no-install-recommends "${chosen[@]}"
}

# apt_has "FIRST|SECOND": one of the alternatives is installed.
apt_has() {
    local name names
    IFS='|' read -ra names <<<"$1"
    for name in "${names[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] && return 0
    done
    return 1
}

# apt_pick "FIRST|SECOND": print the first alternative that can be installed.
apt_pick() {
    local name names
    IFS='|' read -ra names <<<"$1"
    for name in "${names[@]}"; do
        [[ -n $(apt_candidate "$name") ]] && { printf '%s\n' "$name"; return 0; }
    done
    return 1
}

# apt_candidate PACKAGE: print the version that would be installed, or nothing.
apt_candidate() { LC_ALL=C apt-cache policy "$1" | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'; }

# apt_update: the package lists are fresh, as of this run of the script (its children included).
apt_update() {
    [[ -z ${CRCLI_APT_UPDATED:-} ]] || return 0
    say "refreshing the package lists"
    # One broken source among several must not stop us: the install that follows finds out what is lacking.
    apt_quietly apt-get update || true
    export CRCLI_APT_UPDATED=1
}

# apt_quietly COMMAND...: run it without questions, without starting services, its output shown only if it fails.
apt_quietly() (
    log=$(mktemp)
    trap 'services_allowed; rm -f "$log"' EXIT
    trap 'exit 130' INT TERM
    services_denied
    export DEBIAN_FRONTEND=noninteractive
    # A run that was killed inside dpkg leaves packages half configured, and apt then refuses everything.
    if ! { dpkg --configure -a && "$@" -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3; } </dev/null >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        say "failed: $*"
        exit 1
    fi
)

# Packages such as redis-server start themselves when installed, now and at every boot. The tests want the
# program only, so while apt runs a policy file says no (invoke-rc.d and deb-systemd-invoke both ask it), and
# units that came with the packages are disabled afterwards. A policy that was there before comes back.
readonly SERVICE_POLICY=/usr/sbin/policy-rc.d
readonly SERVICE_POLICY_MARK='# crcli: no services while its packages are installed'

services_denied() {
    units_before=$(service_units)
    if [[ -e $SERVICE_POLICY ]] && ! grep -qsF "$SERVICE_POLICY_MARK" "$SERVICE_POLICY"; then
        mv "$SERVICE_POLICY" "$SERVICE_POLICY.before-crcli"
    fi
    printf '#!/bin/sh\n%s\nexit 101\n' "$SERVICE_POLICY_MARK" >"$SERVICE_POLICY"
    chmod 755 "$SERVICE_POLICY"
}

services_allowed() {
    local unit
    rm -f "$SERVICE_POLICY"
    [[ ! -e $SERVICE_POLICY.before-crcli ]] || mv "$SERVICE_POLICY.before-crcli" "$SERVICE_POLICY"
    command -v systemctl >/dev/null || return 0
    comm -13 <(printf '%s\n' "$units_before") <(service_units) | while read -r unit; do
        systemctl disable --quiet "$unit" 2>/dev/null || true
    done
}

service_units() {
    find /lib/systemd/system/ /usr/lib/systemd/system/ -maxdepth 1 \( -name '*.service' -o -name '*.socket' \) \
        -printf '%f\n' 2>/dev/null | sort -u
}
