#!/usr/bin/env bash
# A whole federation on this machine, for one run: TLS, a registered key per SuperNode, own
# data, own rank, own Flower home. Everything it starts ends with it. Linux only.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: local.sh [OPTION ...] [-- KEY=VALUE ...]

Starts a SuperLink and SuperNodes, runs the app on them with these keys of its run config
(ranks.policy is "reported" unless you say otherwise), shows the run's log and takes
everything down. The exit code is 0 only if the run completed.

  --nodes N       how many SuperNodes (default: 3)
  --ranks R,...   the largest rank of each, in turn (default: 4,8,16)
  --data DIR      csv files with columns text and label, one per node in alphabetical order
                  (default: data.name, shared out)
  --port P        port of the SuperLink; the SuperNodes take the next ones (default: free ones)
  --keep DIR      keep certificates, data and logs in this new folder (default: a temporary one)

  deploy/local.sh --nodes 3 --ranks 4,8,16 -- rounds=2 train.steps=3 output=runs/local
TEXT
}

fail() { # message, exit code (default: 1)
    printf 'local.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

nodes=3 ranks=4,8,16 data='' port='' keep=''
while (($#)); do
    case $1 in
    --nodes | --ranks | --data | --port | --keep)
        [[ -n ${2-} ]] || fail "$1 needs a value" 2
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
    -h | --help) usage && exit ;;
    --) shift && break ;;
    *) usage >&2 && fail "unknown option $1" 2 ;;
    esac
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes must be a whole number from 1, got '$nodes'" 2
[[ $ranks =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || fail "--ranks must be like 4,8,16, got '$ranks'" 2
[[ $port =~ ^([1-9][0-9]*)?$ ]] || fail "--port must be a number, got '$port'" 2
IFS=, read -r -a ranks <<<"$ranks"
largest=$(printf '%s\n' "${ranks[@]}" | sort -n | tail -n 1)

# The run config as a file: on the command line Flower splits values at blanks and quotes.
settings() { # key=value ...
    local pair key value
    printf '"%s" = %s\n' min-nodes "$nodes" ranks.policy '"reported"' ranks.max "$largest"
    for pair; do
        key=${pair%%=*} value=${pair#*=}
        [[ $pair == ?*=* && $key != *\"* ]] || fail "expected key=value, got '$pair'" 2
        [[ $value =~ ^(true|false|[-+]?[0-9][0-9_.]*([eE][-+]?[0-9]+)?|\".*\"|\'.*\')$ ]] ||
            value="'$value'" # a text without its quotes
        printf '"%s" = %s\n' "$key" "$value"
    done
}
# What is given here replaces our own line with that key.
settings=$(settings "$@" | awk -F ' = ' '{ line[$1] = $0 } END { for (key in line) print line[key] }')

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname -- "$here")
command -v flwr >/dev/null || PATH=$project/.venv/bin:$PATH
command -v flwr >/dev/null || fail "there is no flwr; run make setup or activate its environment"
python=$(dirname -- "$(command -v flwr)")/python

if [[ -n $keep ]]; then
    [[ ! -e $keep ]] || fail "$keep is there already; name a new folder"
    mkdir -p -- "$keep" && work=$(cd -- "$keep" && pwd)
else
    work=$(mktemp -d "${TMPDIR:-/tmp}/fedlora-local.XXXXXX")
fi

mark=$(basename -- "$work")-$$-$RANDOM
ours() { # Flower detaches processes from their parents; the environment stays with them
    local file
    grep -lsz "^FEDLORA_LOCAL=$mark\$" /proc/[0-9]*/environ |
        while IFS=/ read -r _ _ file _; do echo "$file"; done
}

take_down() {
    local code=$? signal
    local -a pids
    trap '' INT TERM HUP
    set +e
    for signal in TERM KILL KILL; do # twice killed: a process may start another meanwhile
        mapfile -t pids < <(ours)
        ((${#pids[@]})) || break
        kill -s "$signal" "${pids[@]}" 2>/dev/null
        for _ in {1..50}; do [[ -n $(ours) ]] && sleep 0.1; done
    done
    wait 2>/dev/null
    [[ -n $keep ]] || rm -rf -- "$work"
    exit "$code"
}
trap take_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

why() { # name of a log: its end, on standard error
    tail -n 15 -- "$work/logs/$1.log" >&2
}

# Start a program of ours in the background: start HOME LOG COMMAND ...
start() {
    local home=$work/homes/$1 log=$work/logs/$2.log
    mkdir -p -- "$home"
    shift 2
    # should this script be killed outright, the kernel tells them to end
    FEDLORA_LOCAL=$mark FLWR_HOME=$home \
        setsid setpriv --pdeathsig TERM "$@" >"$log" 2>&1 </dev/null &
}

export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
no_proxy=${no_proxy:-${NO_PROXY-}}
export no_proxy=${no_proxy:+$no_proxy,}127.0.0.1
export NO_PROXY=$no_proxy
certificates=$work/certificates
names=()
for ((i = 1; i <= nodes; i++)); do names+=("node-$(printf "%0${#nodes}d" "$i")"); done
mkdir -p -- "$work/logs" "$work/homes"
printf '%s\n' "$settings" >"$work/run.toml"

if [[ -z $data ]]; then
    data=$work/data
    options=()
    for pair; do # share out what the server will test on
        [[ $pair == data.name=* ]] && name=${pair#*=} && name=${name#[\"\']} &&
            options=(--data "${name%[\"\']}")
    done
    PYTHONPATH=$project "$python" "$here/share_out.py" \
        --nodes "$nodes" --output "$data" "${options[@]}" >/dev/null
fi
shopt -s nullglob
tables=("$(cd -- "$data" && pwd)"/*.csv)
shopt -u nullglob
((${#tables[@]} == nodes)) || fail "expected $nodes csv files in $data, got ${#tables[@]}"

"$here/certificates.sh" --dir "$certificates" ca >"$work/logs/certificates.log"
"$here/certificates.sh" --dir "$certificates" server >>"$work/logs/certificates.log"
"$here/certificates.sh" --dir "$certificates" node "${names[@]}" >>"$work/logs/certificates.log"

if [[ -n $port ]]; then
    ports=()
    for ((i = 0; i <= nodes; i++)); do ports+=("$((port + i))"); done
else
    read -r -a ports < <(PYTHONPATH=$project "$python" -m fedlora_app.launch.ports "$((nodes + 1))")
fi
superlink=127.0.0.1:${ports[0]}

start superlink superlink flower-superlink --host 127.0.0.1 --port "${ports[0]}" \
    --ssl-ca-certfile "$certificates/ca.crt" --ssl-certfile "$certificates/server.crt" \
    --ssl-keyfile "$certificates/server.key" --enable-supernode-auth \
    --database "$work/superlink.db" --disable-runtime-dependency-installation
link=$!
for _ in {1..120}; do
    kill -0 "$link" 2>/dev/null || { why superlink && fail "the SuperLink did not start"; }
    "$python" "$here/health.py" "https://$superlink/health" "$certificates/ca.crt" 2>/dev/null && break
    sleep 0.5
done
"$here/certificates.sh" --dir "$certificates" --superlink "$superlink" register "${names[@]}"

declare -A running=()
for i in "${!names[@]}"; do
    start "${names[i]}" "${names[i]}" "$python" -m fedlora_app.supernode --superlink "$superlink" \
        --root-certificates "$certificates/ca.crt" \
        --auth-supernode-private-key "$certificates/nodes/${names[i]}" \
        --host 127.0.0.1 --port "${ports[i + 1]}" \
        --node-config "data-path=\"${tables[i]}\" max-rank=${ranks[i % ${#ranks[@]}]}"
    running[${names[i]}]=$!
done

export FLWR_HOME=$work/homes/operator
mkdir -p -- "$FLWR_HOME"
cat >"$FLWR_HOME/config.toml" <<TEXT
[superlink]
default = "local"
[superlink.local]
address = "$superlink"
root-certificates = "$certificates/ca.crt"
TEXT
answer=$(flwr run "$project" local --run-config "$work/run.toml" --format json) || true
[[ $answer =~ \"run-id\":\ *\"?([0-9]+) ]] || fail "could not submit the run: $answer"
run=${BASH_REMATCH[1]}
echo "run $run on $superlink, $nodes SuperNodes"

FEDLORA_LOCAL=$mark setpriv --pdeathsig TERM flwr log "$run" local --stream &
stream=$!
while kill -0 "$stream" 2>/dev/null; do
    kill -0 "$link" 2>/dev/null || { why superlink && fail "the SuperLink ended"; }
    for name in "${!running[@]}"; do
        kill -0 "${running[$name]}" 2>/dev/null && continue
        echo "local.sh: SuperNode $name ended" >&2 && why "$name"
        unset "running[$name]"
    done
    ((${#running[@]})) || fail "no SuperNode is left"
    sleep 1 &
    wait $! # a signal is answered at once
done

# The end of the log does not say how the run ended.
answer=$(flwr list local --run-id "$run" --format json) || true
[[ $answer =~ \"status-details\":\ \"([^\"]*)\" ]] || fail "how did run $run end? $answer"
[[ $answer == *'"status": "finished:completed"'* ]] || fail "run $run failed: ${BASH_REMATCH[1]}"
