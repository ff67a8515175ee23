#!/usr/bin/env bash
# Make the certificates and keys of a federation, and register SuperNodes with its SuperLink.
set -euo pipefail
umask 077

usage() {
    cat <<'TEXT'
usage: certificates.sh [OPTION ...] ca                 make a certificate authority
       certificates.sh [OPTION ...] server [HOST ...]  make the SuperLink's certificate
       certificates.sh [OPTION ...] node NAME ...      make a key for each SuperNode
       certificates.sh [OPTION ...] register NAME ...  tell a running SuperLink these keys

HOST is a host name or IP address under which SuperNodes and operators reach the SuperLink;
localhost, 127.0.0.1 and ::1 are always in the certificate.

  --dir DIR         where everything is kept (default: certificates)
  --days N          validity (default: ca 3650, server 398; keys do not expire)
  --force           overwrite what is there without asking
  --superlink ADDR  register: host:port of the SuperLink (default: 127.0.0.1:8000)
TEXT
}

fail() { # message, exit code (default: 1)
    printf 'certificates.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

# Ask before anything is overwritten; with nobody to ask, refuse.
may_write() { # file ...
    local file answer
    local -a there=()
    for file; do [[ -e $file ]] && there+=("$file"); done
    ((${#there[@]} == 0 || force)) && return
    [[ -t 0 ]] || fail "${there[*]} is there already; --force overwrites it"
    read -r -p "overwrite ${there[*]}? [y/N] " answer
    [[ $answer == [yY]* ]] || fail "nothing was changed"
}

open_folder() {
    if [[ ! -e $dir ]]; then
        mkdir -p -- "$(dirname -- "$dir")"
        mkdir -m 700 -- "$dir"
    fi
    [[ $(stat -c %a -- "$dir") == 700 ]] ||
        fail "others can look into $dir: use a folder that holds nothing else, of mode 700"
    work=$(mktemp -d "$dir/.new.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
}

new_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$1"; }

make_ca() {
    may_write "$dir/ca.key" "$dir/ca.crt"
    cat >"$work/ca.cnf" <<TEXT
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = FedLoRA federation CA
[extensions]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
TEXT
    new_key "$work/ca.key"
    openssl req -x509 -new -sha384 -config "$work/ca.cnf" -key "$work/ca.key" \
        -days "${days:-3650}" -out "$work/ca.crt"
    chmod 644 "$work/ca.crt"
    mv -f -- "$work/ca.key" "$work/ca.crt" "$dir"
    echo "made $dir/ca.key   stays here: whoever has it can pose as the SuperLink"
    echo "     $dir/ca.crt   copy to the SuperLink, to every SuperNode and every operator"
}

make_server() { # host ...
    local host names='DNS:localhost, IP:127.0.0.1, IP:::1'
    [[ -f $dir/ca.key && -f $dir/ca.crt ]] || fail "no CA in $dir; run first: certificates.sh ca"
    for host; do
        case $host in
        localhost | 127.0.0.1 | ::1) ;;
        '' | *[!A-Za-z0-9.:*-]*) fail "'$host' is neither a host name nor an IP address" 2 ;;
        *:*) names+=", IP:$host" ;;
        *[!0-9.]*) names+=", DNS:$host" ;;
        *) names+=", IP:$host" ;;
        esac
    done
    may_write "$dir/server.key" "$dir/server.crt"
    cat >"$work/server.cnf" <<TEXT
[req]
distinguished_name = name
prompt = no
[name]
CN = FedLoRA SuperLink
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
TEXT
    new_key "$work/server.key"
    openssl req -new -config "$work/server.cnf" -key "$work/server.key" -out "$work/server.csr"
    # a serial number of its own for each, without a file to count in
    openssl x509 -req -sha384 -in "$work/server.csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" \
        -set_serial "0x$(openssl rand -hex 16)" -days "${days:-398}" \
        -extfile "$work/server.cnf" -extensions extensions -out "$work/server.crt" 2>"$work/log" ||
        fail "openssl could not sign the certificate: $(<"$work/log")"
    openssl verify -CAfile "$dir/ca.crt" "$work/server.crt" >/dev/null
    chmod 644 "$work/server.crt"
    mv -f -- "$work/server.key" "$work/server.crt" "$dir"
    echo "made $dir/server.key   copy to the SuperLink only"
    echo "     $dir/server.crt   copy to the SuperLink; for $names;" \
        "until $(openssl x509 -in "$dir/server.crt" -noout -enddate | cut -d= -f2)"
}

check_names() {
    local name
    (($#)) || fail "name at least one SuperNode" 2
    for name; do
        [[ $name =~ ^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$ && $name != *.pub ]] ||
            fail "'$name' is no name: use letters, digits, '-', '_' and '.'" 2
    done
}

make_nodes() { # name ...
    local name
    check_names "$@"
    mkdir -p -- "$dir/nodes"
    local -a files=()
    for name; do files+=("$dir/nodes/$name" "$dir/nodes/$name.pub"); done
    may_write "${files[@]}"
    for name; do
        rm -f -- "$work/$name" "$work/$name.pub" # named twice
        ssh-keygen -q -t ecdsa -b 384 -N '' -C "$name" -f "$work/$name"
        chmod 644 "$work/$name.pub"
        mv -f -- "$work/$name" "$work/$name.pub" "$dir/nodes"
        echo "made $dir/nodes/$name       copy to the SuperNode $name only"
        echo "     $dir/nodes/$name.pub   stays here, to register it"
    done
}

register_nodes() { # name ...
    local name answer id failed=0
    check_names "$@"
    for name; do [[ -f $dir/nodes/$name.pub ]] || fail "there is no $dir/nodes/$name.pub"; done
    cat >"$work/config.toml" <<TEXT
[superlink]
default = "superlink"
[superlink.superlink]
address = "$superlink"
root-certificates = "$(cd -- "$dir" && pwd)/ca.crt"
TEXT
    export FLWR_HOME=$work FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
    for name; do
        # its exit code is 0 for errors too
        answer=$(flwr supernode register "$dir/nodes/$name.pub" superlink --name "$name" --format json) || true
        if [[ $answer == *'"success": true'* && $answer =~ \"node-id\":\ *([0-9]+) ]]; then
            id=${BASH_REMATCH[1]}
            echo "$id" >"$dir/nodes/$name.id"
            echo "registered $name as node $id"
        elif [[ $answer == *'already in use'* ]]; then
            echo "$name: the SuperLink knows this key already" \
                "(a key that was unregistered needs a new one: certificates.sh node $name)" >&2
            failed=1
        else
            printf 'could not register %s with %s: %s\n' "$name" "$superlink" "$answer" >&2
            failed=1
        fi
    done
    return "$failed"
}

dir=certificates
days=
force=0
superlink=127.0.0.1:8000
while [[ ${1-} == -* ]]; do
    case $1 in
    --dir | --days | --superlink)
        [[ -n ${2-} ]] || fail "$1 needs a value" 2
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
    --force) force=1 && shift ;;
    -h | --help) usage && exit ;;
    *) usage >&2 && fail "unknown option $1" 2 ;;
    esac
done
[[ $days =~ ^([1-9][0-9]*)?$ ]] || fail "--days must be a whole number from 1, got '$days'" 2

command=${1-}
case $command in
ca) (($# == 1)) || fail "ca takes no names" 2 ;;
server | node | register) ;;
*) usage >&2 && exit 2 ;;
esac
shift
open_folder
case $command in
ca) make_ca ;;
server) make_server "$@" ;;
node) make_nodes "$@" ;;
register) register_nodes "$@" ;;
esac
