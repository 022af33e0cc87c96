#!/usr/bin/env bash
# Installs what tests/slurm starts a cluster of: slurmctld, slurmd and munged, with Debian's or Ubuntu's packages, as root.
# None of it is left running, and no file of the machine's is changed: the tests have a cluster of their own, whose nodes
# are called 127.0.0.1 and 127.0.0.2, names that need no line in a hosts file.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
missing=""
for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || missing=$program
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: there is no $missing, which is installed here by apt-get as root alone" >&2
    exit 1
fi
# Packages start their services where there is a systemd; this keeps them from it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
