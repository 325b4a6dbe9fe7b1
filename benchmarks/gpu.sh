#!/usr/bin/env bash
# Check and time everything on a GPU; each part has a time limit, and its results are written when it ends.
#
#     bash benchmarks/gpu.sh OUT [check] [speed] [demo]
#
# check: the three stages in fp32, bf16 and fp16 against the CPU's losses, resuming, xformers, and diffusers' images
# speed: a training step and sampling against diffusers, with a UNet of Stable Diffusion 1.5's shape
# demo:  full training of the demo's three stages, with its report and sample sheet
set -u
case ${1:---help} in -*) sed -n '2,8s/^# \?//p' "$0"; exit "$([ "${1:-}" = --help ] && echo 0 || echo 2)" ;; esac
out=$1; shift
python=${PYTHON:-python3}
mkdir -p "$out" runs
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

part() { # name, limit in seconds, command
    local name=$1 limit=$2 started=$SECONDS; shift 2
    timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
    echo "== $name: status $?, $((SECONDS - started)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
for what in "${@:-check}"; do
    case $what in
    check)
        if [ ! -f runs/gpu/reference.json ]; then
            CUDA_VISIBLE_DEVICES= part reference 240 "$python" benchmarks/gpu_check.py reference --out runs/gpu
        fi
        part check "${CHECK_SECONDS:-170}" "$python" benchmarks/gpu_check.py check --out runs/gpu ${CHECK_ONLY:+--only $CHECK_ONLY}
        cp runs/gpu/check.json "$out" 2>/dev/null
        grep -E "^(ok|FAIL|[0-9]+ of)" "$out/check.log" | cut -c1-420
        ;;
    speed)
        part train-small 60 "$python" benchmarks/training_step.py --shape demo --batch-size 256 --precision bf16 \
            --variants ldm "diffusers script" "diffusers by hand" --out "$out/train-small.json"
        part train-sd15 "${TRAIN_SECONDS:-200}" "$python" benchmarks/training_step.py --shape sd15 --batch-size 32 \
            --precision bf16 --steps 6 --variants ldm "diffusers script" "diffusers by hand" "ldm + cl" \
            "diffusers by hand + cl" "ldm + cl + compile" "diffusers by hand + cl + compile" \
            --out "$out/train-sd15.json"
        part sample-sd15 "${SAMPLE_SECONDS:-150}" "$python" benchmarks/sampling_speed.py --shape sd15 --precision bf16 \
            --batch 1 16 --repeats 3 --out "$out/sample-sd15.json"
        grep -hE "^\{" "$out"/train-small.log "$out"/train-sd15.log "$out"/sample-sd15.log | cut -c1-300
        ;;
    demo)
        part demo "${DEMO_SECONDS:-240}" "$python" scripts/demo.py
        cp runs/demo/report.json "$out/demo-report.json" 2>/dev/null
        cp runs/demo/samples.png "$out/demo-samples.png" 2>/dev/null
        cat "$out/demo-report.json" 2>/dev/null || tail -5 "$out/demo.log"
        ;;
    *) echo "unknown part $what: check, speed or demo"; exit 2 ;;
    esac
done
