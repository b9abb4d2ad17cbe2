#!/usr/bin/env bash
# Installs Slurm and munge on a fresh Debian machine, for a cluster of one node; starts nothing.
set -euo pipefail
packages=(slurm-wlm munge)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${packages[@]}" >/dev/null
fi
