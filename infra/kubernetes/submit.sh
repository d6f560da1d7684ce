#!/bin/sh
# submit.sh RAYJOB.yaml: makes the RayJob of the tick $TICK, owned by the tick's job $OWNER_UID, and
# waits for its end, so that the schedule's `concurrencyPolicy: Forbid` covers the run itself.
# A second pod of the same tick finds the RayJob by its name and waits for it. Ends with 0 when the
# run is complete, 2 when it failed for good; any other code is worth another pod.
set -eu
export HOME=/tmp

state() {
  kubectl get rayjob "$TICK" --ignore-not-found \
    -o jsonpath='{.metadata.name} {.status.jobDeploymentStatus}'
}

found="$(state)"
if [ -z "$found" ]; then
  owner="{\"apiVersion\": \"batch/v1\", \"kind\": \"Job\", \"name\": \"$TICK\", \"uid\": \"$OWNER_UID\"}"
  kubectl patch --local -f "$1" -o yaml --type=json -p "[
    {\"op\": \"replace\", \"path\": \"/metadata/name\", \"value\": \"$TICK\"},
    {\"op\": \"add\", \"path\": \"/metadata/ownerReferences\", \"value\": [$owner]}
  ]" > "$HOME/rayjob.yaml"
  kubectl create -f "$HOME/rayjob.yaml"
fi

while true; do
  # A moment without the API server is no verdict: kubectl complains, the run goes on.
  found="$(state)" || found="unknown"
  case "$found" in
    *" Complete") echo "$TICK: complete"; exit 0 ;;
    *" Failed") echo "$TICK: failed, kubectl describe rayjob $TICK says why" >&2; exit 2 ;;
    "") echo "$TICK: somebody deleted the RayJob" >&2; exit 2 ;;
  esac
  sleep "${POLL_SECONDS:-15}"
done
