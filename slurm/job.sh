# shellcheck shell=bash disable=SC2034
# Sourced by the batch scripts: a job that saves before its time is up, and goes back to the queue while it gets further.
#     GRACE_SECONDS=180  from the signal USR1 to the end of the job, as --signal says
#     MAX_FAILURES=3     so often a job is run again that failed, but had got further, or could not read its data at all

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
# An array's last task has the id of the whole array, which must not be signalled or requeued for it.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over
timer="" stopped="" running=""
trap stop USR1
launcher=(srun --kill-on-bad-exit=1 bash "$repository/slurm/launch.sh")

settings_of() { # SCRIPT SETTING...: what they come to, as YAML; what is wrong with them is said, and ends the job
    case $2 in
        settings=*) cat "${2#settings=}" ;; # checked when it was submitted
        *) "$python" "$repository/scripts/$1.py" "${@:2}" --cfg ;;
    esac
}

value_of() { # KEY.KEY: of YAML
    "$python" -c 'import functools, sys, yaml
print(functools.reduce(dict.__getitem__, sys.argv[1].split("."), yaml.safe_load(sys.stdin)))' "$1"
}

stop() { # the steps of this job, which are the launchers and what they have started
    told=yes stopped=yes
    scancel --signal=USR1 "$job" || true
    [ -z "$timer" ] && [ -n "$running" ] || return 0
    # What has nothing to save does not listen to USR1, and is asked to end a minute before it has to.
    (sleep $((${GRACE_SECONDS:-180} - 60)) && kill -TERM "$running" && scancel --signal=TERM "$job") &
    timer=$!
}

watched() { # COMMAND...: runs it; its exit code is in $code, and whether it was asked to end in $stopped
    code=75
    [ -z "$stopped" ] || return 0
    "$@" &
    running=$!
    while told="" && { wait "$running" && code=0 || code=$?; } && [ -n "$told" ]; do
        : # a signal ends `wait`, and not what it waits for
    done
    [ -z "$timer" ] || kill "$timer" 2>/dev/null || true # or it would signal the next run of this job
}

# FOLDER PROGRESS COMMAND...: ends the job as the command ends, or puts it back to the queue. PROGRESS is a command that
# prints how far the work is; notes on the job are kept in FOLDER.
supervise() {
    local progress=$2 before after failures answer
    export JOB_NOTES=$1/$job
    mkdir -p "$JOB_NOTES"
    rm -f "$JOB_NOTES"/exit-*
    before=$("$progress")
    watched "${@:3}"
    for answer in 2 3; do # from any node: srun's own code may be that of a node which it killed for another's
        ! grep -qsx "$answer" "$JOB_NOTES"/exit-* || code=$answer
    done
    case $code in
        0) exit 0 ;;
        2) end 2 "the settings or the data are wrong, see above" ;;
        3) end 3 "an alarm has ended the run, which is saved at $("$progress")" ;;
    esac
    after=$("$progress")
    if [ "$after" = "$before" ]; then
        [ -z "$stopped" ] || end 1 "stopped before it got any further ($before): it needs more time than --time gives"
        # 75 says that another try may help, as after a file system that was away; but not for ever.
        [ "$code" -eq 75 ] || end "$code" "ended with exit code $code and got no further than $before"
    fi
    if [ -z "$stopped" ] && { [ "$code" -ne 75 ] || [ "$after" = "$before" ]; }; then # 75: saved, and to be run again
        failures=$(($(cat "$JOB_NOTES/failures" 2>/dev/null || echo 0) + 1))
        echo "$failures" >"$JOB_NOTES/failures"
        [ "$failures" -le "${MAX_FAILURES:-3}" ] || end "$code" "ended with exit code $code and has failed $failures times"
    fi
    ! scontrol show job "$job" | grep -q JobState=CANCELLED || end "$code" "cancelled at $after"
    echo "$SLURM_JOB_NAME ended with exit code $code and is at $after: back to the queue"
    scontrol requeue "$job"
    exit 0
}

end() { # CODE WHY
    echo "error: $SLURM_JOB_NAME: ${*:2}" >&2
    exit "$1"
}
