#!/usr/bin/env bash
# terravox ARGUMENTS, on a node that joins the cluster without cores.
set -euo pipefail
ray start --address=head:6379 --num-cpus=0 --num-gpus=0 --object-store-memory=268435456 >&2
# exec: a stop signal reaches the command, which drains its run; the node ends with the container.
exec terravox "$@"
