#!/bin/sh
# The paper's four arms on ImageNet, then one comparison: bfloat16 and FP8, each without and with TWEO. Not run by us.
#
#   sh recipes/imagenet.sh vit_base /path/to/imagenet [OUTPUT]           # GPUS=8 unless said otherwise
#
# MODEL is a recipe that has arms (tweo-train --list-recipes): MODEL, MODEL_fp8, MODEL_tweo, MODEL_tweo_fp8. Each arm
# continues where it was interrupted. An arm that breaks, as the paper's MODEL_fp8 does, is compared by its last
# checkpoint; the exit status is 0 if all were trained to their end and validated.
set -u
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$1 data=$2 output=${3:-output/imagenet}
status=0 checkpoints=
for arm in "$model" "${model}_fp8" "${model}_tweo" "${model}_tweo_fp8"; do
  torchrun --nproc-per-node "${GPUS:-8}" -m tweo_timm.train -c "$arm" --data-dir "$data" --output "$output" \
    --experiment "$arm" --resume auto || { echo "$arm ended with status $?" >&2; status=1; }
  [ ! -f "$output/$arm/last.pth.tar" ] || checkpoints="$checkpoints $arm/last.pth.tar"
done
[ -n "$checkpoints" ] || { echo "no arm wrote a checkpoint" >&2; exit 1; }
# Relative names, so that a folder with a space in its name stays one word.
data=$(cd "$data" && pwd) && cd "$output" || exit 1
# shellcheck disable=SC2086
tweo-validate --checkpoint $checkpoints --data-dir "$data" --report report --stethoscope --fp8-readiness \
  --quantize w8a8-tt w8a8-tt+res w8a8-ck w8a8-ck+res || status=1
exit $status
