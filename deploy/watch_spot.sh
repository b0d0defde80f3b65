#!/usr/bin/env bash
# Waits for AWS's notice that it reclaims this spot machine, then drains the machine's Ray node and ends.
#
#   watch_spot.sh ADDRESS [SECONDS]     ADDRESS: of Ray's head, host:port. SECONDS: between two looks, default 5.
#
# Ray does not ask AWS itself. Told in this way, it starts nothing more on the machine and counts the loss as a preemption.
set -u
trap '' HUP  # it outlives the shell that starts the node
export RAY_ADDRESS=$1
interval=${2:-5}
metadata=http://169.254.169.254/latest

until
  token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' $metadata/api/token) &&
    curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" $metadata/meta-data/spot/instance-action &&
    ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message='AWS takes this spot machine back' \
      --deadline-remaining-seconds=110
do
  sleep "$interval"
done
