#!/usr/bin/env bash
# One role of Patcher's parallel form, on one node or several: run it on every node of the role, with the same words.
#
#     NODES=2 HEAD=node1 recipes/cluster/torchrun.sh defender              # on node1 and on node2
#     HEAD=node3 recipes/cluster/torchrun.sh attacker attacker-1           # on node3
#
# Words after the role (and an attacker's name) are flags of `holdfast align patcher`, after those of the recipe.
# The defender goes on from its last complete checkpoint. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail

RUN=${RUN:-patcher-run}                             # the run's folder, on a file system that all nodes see
EXCHANGE=${EXCHANGE:-$RUN/exchange}                 # where the roles meet; may lie on faster storage
CONFIG=${CONFIG:-recipes/cluster/patcher.yaml}      # the recipe, one for both roles
NODES=${NODES:-1}                                   # nodes of this role
GPUS=${GPUS:-8}                                     # GPUs of a node that this role uses
HEAD=${HEAD:-localhost}                             # this role's first node
PORT=${PORT:-29500}                                 # a free port there
JOB=${JOB:-patcher}                                 # tells this run's rendezvous from another's
GRACE=${GRACE:-600}                                 # seconds for the last checkpoint after SIGTERM

role=${1:?expected a role, defender or attacker}
shift
case $role in
    defender)
        name=defender
        words=(--output_dir "$RUN/hardened")
        # transformers writes a checkpoint's trainer_state.json last.
        if compgen -G "$RUN/hardened/checkpoint-*/trainer_state.json" >/dev/null; then
            words+=(--resume_from_checkpoint last)
        fi
        ;;
    attacker)
        name=${1:?expected a name for this attacker, different for each}
        shift
        # A big model's defender may publish hours apart; it is not for the attacker to end the run.
        words=(--attacker_name "$name" --output_dir "$RUN/attackers/$name" --exchange_timeout 86400)
        ;;
    *)
        echo "torchrun.sh: expected a role, defender or attacker, got $role" >&2
        exit 2
        ;;
esac

command=(
    torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --max_restarts 0 --shutdown_timeout "$GRACE"
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "$JOB-$name"
    -m holdfast align patcher --config "$CONFIG" --fsdp --role "$role" --exchange "$EXCHANGE" "${words[@]}" "$@"
)
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
