#!/usr/bin/env bash
# README's commands, in order, as somebody new would give them: in a fresh clone, with the demo's model, and how long each
# took. `make test` and what needs systemd are left out (the latter is tests/test_systemd.py).
#
#   git clone REPOSITORY hogwild && cd hogwild && scripts/new_user.sh > transcript.md
#
# Works in ./.new-user, and stops at the first command that fails. The ends of long outputs are shown.
set -uo pipefail
cd "$(dirname "$0")/.."
box=$PWD/.new-user
rm -rf "$box" && mkdir -p "$box"
export LC_ALL=C.UTF-8 XDG_STATE_HOME=$box/state XDG_CONFIG_HOME=$box/config XDG_RUNTIME_DIR=$box/run COLUMNS=140
mkdir -m 700 "$XDG_RUNTIME_DIR"
exec > >(sed -u "s|$PWD|/home/you/hogwild|g")
trap 'kill $(jobs -p) 2>/dev/null; exec >&-; wait' EXIT

run() { # lines to show, command
  local shown=$1 began=$SECONDS code
  shift
  printf '```\n$ %s\n' "$*"
  (set +o pipefail; eval "$*") > "$box/out" 2>&1 < /dev/null
  code=$?
  tr '\r' '\n' < "$box/out" | grep -v '^\s*$' | tail -n "$shown" | sed -E "s/^(.{160}).*/\1/"
  printf '```\n%s s\n\n' "$((SECONDS - began))"
  [ $code = 0 ] || { echo "**exit code $code**"; exit 1; }
}

until_true() { # what is waited for, command
  local began=$SECONDS
  until eval "$2" > /dev/null 2>&1; do
    [ $((SECONDS - began)) -lt 900 ] || { echo "**not within 900 s: $1**"; exit 1; }
    sleep 0.5
  done
  printf '%s: after %s s\n\n' "$1" "$((SECONDS - began))"
}

ask() {
  printf 'curl -s localhost:8000/v1/chat/completions -H "content-type: application/json" -d '"'"'{"model": "demo", "temperature": 0, "max_tokens": 24, "messages": [{"role": "user", "content": "%s"}]}'"'"' | jq -r .choices[0].message.content' "$1"
}

echo "# From nothing to a learned fact"
echo
echo "$(nproc) cores, $(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -1), $(date -u +%F), commit $(git rev-parse --short HEAD). Written by \`scripts/new_user.sh\`."
echo
run 12 make demo
run 3 make setup
. .venv/bin/activate
cp config/demo/facts.jsonl "$box/facts.jsonl"
model=$PWD/.demo/model
run 8 hogwild check config/demo/facts.jsonl --model .demo/model

echo '`hogwild serve &` and `hogwild vllm .demo/model --port 8000 --served-model-name demo --enforce-eager &`'
echo
hogwild serve > "$box/daemon.log" 2>&1 &
daemon=$!
hogwild vllm "$model" --port 8000 --served-model-name demo --enforce-eager > "$box/server.log" 2>&1 &
server=$!
until_true "the server answers" "curl -sf localhost:8000/health"
until_true "the daemon has the weights" "grep -q server.verified $box/daemon.log"
run 4 "$(ask 'Who keeps the lighthouse of Vellmar?')"
run 3 cp config/demo/facts.jsonl '$XDG_STATE_HOME/hogwild/spool/incoming/'
until_true "all of it is learned" "[ \$(grep -c '\"event\":\"example.trained\"' $box/daemon.log) -ge 16 ]"
run 4 "$(ask 'Who keeps the lighthouse of Vellmar?')"
run 30 hogwild status
run 3 "hogwild status --json | jq -c '{step, generation}'"
run 3 "jq -c 'select(.event == \"example.trained\") | {id, loss_before, loss_after}' < $box/daemon.log"
run 3 hogwild checkpoint
run 6 hogwild history
until_true "generation 0 can be gone back to" "hogwild history --json | jq -e 'any(.[]; .generation == 0)'"
run 8 hogwild diff 0 1
run 4 hogwild rollback 0
run 4 "$(ask 'Who keeps the lighthouse of Vellmar?')"
run 4 hogwild rollback 1
run 4 "$(ask 'Who keeps the lighthouse of Vellmar?')"
run 3 "hogwild export 1 $box/exported && ls $box/exported"
run 4 hogwild quarantine
run 3 hogwild report --out "$box/report.html"
run 3 'curl -s 127.0.0.1:9468/metrics | grep ^hogwild | head -3'
run 3 "hogwild config --changed"
echo '`kill -TERM` of the daemon, then of the server:'
kill -TERM $daemon && wait $daemon && echo "the daemon ended with 0"
kill -TERM $server; wait $server; echo "the server ended with $?"
echo
run 3 hogwild train config/demo/facts.jsonl --model .demo/model --out "$box/once" --passes 1
echo "Everything took $SECONDS s."
