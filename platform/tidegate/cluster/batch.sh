#!/bin/bash
%%{options}
# With arguments it trains and ends: `sbatch FILE jobs/h100.yaml --set train.tokens=1e9`, `sbatch FILE --resume RUN`.
# Without, the cluster stays until the time limit or scancel, for `tidegate train --address` from a node.
set -euo pipefail
umask 077
%%{environment}
%%{setup}
ray --version | grep -qF 'version %%{ray}' || {
  echo "Ray %%{ray} is needed on every node, found: $(ray --version)" >&2
  exit 1
}

# Whoever has the token can run code on the nodes: it is in a file that this user alone reads.
folder=%%{storage}/state/clusters
mkdir -p "$folder"
export RAY_AUTH_TOKEN_PATH=$folder/%%{name}-$SLURM_JOB_ID.auth
od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + 2 * (SLURM_JOB_ID % 6000))) # and the next; another job on the node has others
address=${nodes[0]}:$port
run=0
started=()

finish() { # whatever the end was; at SIGTERM Ray drains and ends its processes
  trap - EXIT TERM INT
  for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${started[@]}"; do wait "$pid" || true; done
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
warned() { # the time limit is near, or the job is preempted or cancelled: the run saves first
  if ((run)); then
    kill -TERM "$run" 2>/dev/null || true
    wait "$run" || true
  fi
  exit 143
}
trap finish EXIT
trap warned TERM INT

step() { exec srun --overlap --ntasks-per-node=1 %%{container}"$@"; } # for the background: signals to $! reach srun

step --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  ray start --head --block --node-ip-address="${nodes[0]}" --port="$port" \
  --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
  --num-cpus=%%{cpus} --num-gpus=%%{gpus} --temp-dir="/tmp/tidegate-$SLURM_JOB_ID" &
started+=($!)
for ((second = 0; ; second++)); do
  if ray health-check --address="$address" >/dev/null 2>&1; then break; fi
  if ! kill -0 "${started[0]}" 2>/dev/null || ((second == 120)); then
    echo "no Ray answers at $address after $second s" >&2
    exit 1
  fi
  sleep 1
done
if ((${#nodes[@]} > 1)); then
  others=$((${#nodes[@]} - 1))
  step --nodes="$others" --ntasks="$others" --exclude="${nodes[0]}" \
    ray start --block --address="$address" --num-cpus=%%{cpus} --num-gpus=%%{gpus} &
  started+=($!)
fi
echo "Ray at $address; join with RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"

if (($# == 0)); then
  wait -n "${started[@]}"
  echo "the Ray of a node has ended" >&2
  exit 1
fi
step --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" tidegate train "$@" --address "$address" &
run=$!
wait "$run"
