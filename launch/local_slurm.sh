#!/usr/bin/env bash
# A real two-node Slurm on this machine, for tests and for trying megafish before touching a cluster.
#
#   launch/local_slurm.sh install          install slurm-wlm and munge (Debian, Ubuntu), unless they are there
#   eval "$(launch/local_slurm.sh start)"  start it, and let this shell's Slurm commands talk to it
#   launch/local_slurm.sh status           its nodes and jobs
#   launch/local_slurm.sh stop             end its jobs and daemons, and remove its folder
#
# start, status and stop take a folder as well (default: megafish-slurm-UID in $TMPDIR or /tmp). Everything lies there.
# Nodes n1 and n2 have $NODE_CPUS cores each (default 2, whatever the machine has). Partition `main` can be preempted
# (a minute to save, then back to the queue) by jobs of partition `urgent`.
set -euo pipefail

NODE_CPUS=${NODE_CPUS:-2}
DAEMONS=(munged slurmctld slurmd)
# Debian puts them where only root's PATH leads.
PATH=$PATH:/usr/sbin:/sbin

die() {
    echo "local_slurm.sh: $*" >&2
    exit 1
}

usage() {
    # The comment at the top of this file.
    sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}"
}

missing() {
    local program
    for program in sbatch "${DAEMONS[@]}"; do
        command -v "$program" > /dev/null || echo "$program"
    done
}

install() {
    [[ $(missing) ]] || return 0
    command -v apt-get > /dev/null || die "no apt-get here: install Slurm and munge with this system's own packages"
    local root=()
    if ((EUID != 0)); then
        sudo -n true 2> /dev/null || die "installing needs root: sudo apt-get install slurm-wlm munge"
        root=(sudo -n)
    fi
    # The packages bring system services, which this cluster does not use: they are not to be started.
    local policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee "$policy" > /dev/null
        "${root[@]}" chmod +x "$policy"
        # shellcheck disable=SC2064  # the values of now
        trap "${root[*]} rm -f $policy" EXIT
    fi
    echo "installing slurm-wlm and munge" >&2
    local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq)
    local log
    log=$(mktemp)
    "${apt[@]}" install -y --no-install-recommends slurm-wlm munge > "$log" 2>&1 ||
        { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends slurm-wlm munge; } > "$log" 2>&1 ||
        die "apt-get could not install slurm-wlm and munge: $(tail -n 1 "$log")"
    rm -f "$log"
}

# Ports that nobody listens on, so that two clusters can run beside each other.
free_ports() {
    local port found=0
    for ((port = 16800 + RANDOM % 4000; found < $1; port++)); do
        if ! (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
            echo "$port"
            found=$((found + 1))
        fi
    done
}

configure() {
    local user host ports version
    user=$(id -un) host=$(hostname -s)
    mapfile -t ports < <(free_ports 3)
    cat > "$SLURM_CONF" << END
ClusterName=megafish
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A job that goes back to the queue starts again when its last credential has expired: after seconds, not minutes.
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
# Finished jobs can be asked for during this time: there are no accounts.
MinJobAge=3600
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool_%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd_%n.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd_%n.log
# The nodes are what is said here, whatever the machine has.
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=$NODE_CPUS RealMemory=16000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=$NODE_CPUS RealMemory=16000
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 DefaultTime=60 MaxTime=INFINITE
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF DefaultTime=60 MaxTime=INFINITE
END
    version=$(slurmctld -V | grep -o '[0-9]*\.[0-9]*' | head -n 1)
    # From 23.11 on slurmd insists on control groups unless told that there are none to use.
    if [[ $(printf '%s\n23.11\n' "$version" | sort -V | head -n 1) == 23.11 ]]; then
        echo "CgroupPlugin=disabled" > "$FOLDER/cgroup.conf"
    fi
}

say_how() {
    echo "export SLURM_CONF=$SLURM_CONF"
    echo "two nodes, n1 and n2, with $NODE_CPUS cores each, are up; their files lie in $FOLDER" >&2
    if [[ -t 1 ]]; then
        echo "next: eval \"\$(launch/local_slurm.sh start)\" lets this shell's Slurm commands find them" >&2
    else
        echo "next: megafish launch slurm tiny data.train=corpus --profile local" >&2
    fi
}

idle_nodes() {
    sinfo --noheader --Node --format='%N %T' 2> /dev/null | sort -u | grep -c ' idle$' || true
}

start() {
    local lacking
    lacking=$(missing | paste -s -d ' ')
    [[ ! $lacking ]] || die "not installed: $lacking. Run: launch/local_slurm.sh install"
    if running; then
        say_how
        return
    fi
    [[ ! -e $FOLDER ]] || stop
    mkdir -p "$FOLDER"/{munge,state,spool_n1,spool_n2}
    chmod 700 "$FOLDER" "$FOLDER/munge"
    configure
    local munge=$FOLDER/munge
    (umask 077 && head -c 128 /dev/urandom > "$munge/key")
    # --force: munge warns of folders that others can write to above its own, such as /tmp.
    munged --force --socket="$munge/socket" --key-file="$munge/key" --pid-file="$munge/pid" \
        --log-file="$munge/log" --seed-file="$munge/seed" 2> "$munge/words" || die "munged: $(tail -n 1 "$munge/words")"
    slurmctld -c -f "$SLURM_CONF" || die "slurmctld: $(tail -n 1 "$FOLDER/slurmctld.log")"
    local node
    for node in n1 n2; do
        slurmd -N "$node" -f "$SLURM_CONF" || die "slurmd: $(tail -n 1 "$FOLDER/slurmd_$node.log")"
    done
    local tries
    for ((tries = 0; tries < 150; tries++)); do
        if (($(idle_nodes) == 2)); then
            say_how
            return
        fi
        sleep 0.2
    done
    die "the nodes are not up after 30 s: $(tail -qn 1 "$FOLDER"/slurm*.log | paste -s -d '; ')"
}

running() {
    [[ -f $SLURM_CONF ]] && scontrol ping 2> /dev/null | grep -q 'UP$'
}

status() {
    running || die "no cluster runs in $FOLDER; next: eval \"\$(launch/local_slurm.sh start)\""
    sinfo
    squeue
}

# What is left of jobs, and of daemons that did not listen: their environment names the cluster's configuration.
processes() {
    local environment pid
    for environment in /proc/[0-9]*/environ; do
        pid=${environment//[!0-9]/}
        grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environment" 2> /dev/null || continue
        if grep -qz '^SLURM_JOB_ID=' "$environment" || [[ $(cat "/proc/$pid/comm") =~ ^(slurm|munged) ]]; then
            echo "$pid"
        fi
    done 2> /dev/null
}

stop() {
    [[ -d $FOLDER ]] || return 0
    # Only what `start` made is removed.
    [[ -f $SLURM_CONF && -d $FOLDER/munge ]] || die "$FOLDER is no folder of a local Slurm: left alone"
    local pid_file pid tries left
    if running; then
        scancel --user="$(id -un)" --signal=KILL --full 2> /dev/null || true
        scancel --user="$(id -un)" 2> /dev/null || true
        for ((tries = 0; tries < 50; tries++)); do
            [[ $(squeue --noheader) ]] || break
            sleep 0.1
        done
    fi
    for pid_file in "$FOLDER"/slurmd_n?.pid "$FOLDER/slurmctld.pid" "$FOLDER/munge/pid"; do
        [[ -f $pid_file ]] || continue
        pid=$(< "$pid_file")
        kill "$pid" 2> /dev/null || continue  # it has died before
        for ((tries = 0; tries < 50; tries++)); do
            kill -0 "$pid" 2> /dev/null || break
            sleep 0.1
        done
    done
    left=$(processes)
    # shellcheck disable=SC2086  # one word a process
    [[ ! $left ]] || kill -KILL $left 2> /dev/null || true
    rm -rf "$FOLDER"
}

case ${1:-} in
    -h | --help) usage && exit 0 ;;
    install | start | status | stop) ;;
    *)
        echo "local_slurm.sh: ${1:-no word}: expected install, start, status or stop (--help says more)" >&2
        exit 2
        ;;
esac
(($# <= 2)) || die "one folder at most"
FOLDER=${2:-${TMPDIR:-/tmp}/megafish-slurm-$(id -u)}
FOLDER=$(realpath -m "$FOLDER")
export SLURM_CONF=$FOLDER/slurm.conf
"$1"
