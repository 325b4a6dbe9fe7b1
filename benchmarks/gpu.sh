#!/usr/bin/env bash
# Check and measure everything on a GPU in eight minutes. Each part has a time limit, and writes its results as it goes.
#
#     bash benchmarks/gpu.sh OUT [PART…]
#
# Parts, in this order by default:
#   check     the three stages in fp32, bf16 and fp16 against the CPU's losses; resuming; xformers; images against
#             diffusers' and against fp32, also optimized. Needs runs/gpu/reference.json, which the CPU makes:
#                 CUDA_VISIBLE_DEVICES= python benchmarks/gpu_check.py reference
#             If it is missing, it is made first.
#   sampling  rows of peers.py: images by a UNet of Stable Diffusion 1.5's shape
#   training  rows of peers.py: training steps
#   demo      training of the demo's three stages, with its report and sample sheet; it stops in time
#   more      further rows of peers.py, until the time is over
#
# OUT gets check.json, peers.json, peers.md, report.json, samples.png and log.txt. GPU_SECONDS (default 470) limits all
# parts together. GPU_SH_TINY=1 runs every part with tiny networks, also on a CPU. PYTHON is the interpreter (default
# python3). If the folder .whl exists, its wheels are installed first, for packages that the machine lacks.
set -u
case ${1:---help} in -*) sed -n '2,19s/^# \?//p' "$0"; exit "$([ "${1:-}" = --help ] && echo 0 || echo 2)" ;; esac
out=$1; shift
python=${PYTHON:-python3}
work=${GPU_WORK:-runs/gpu}
tiny=${GPU_SH_TINY:+1}
slower=$([ "$tiny" ] && echo 6 || echo 1)  # a CPU may need more time even for tiny networks
end=$((SECONDS + ${GPU_SECONDS:-470} * slower))
mkdir -p "$out" "$work"
: > "$out/log.txt"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

part() { # name, limit in seconds, command: run it within the limit and the total time; its output goes to the log
    local name=$1 limit=$(($2 * slower)) started=$SECONDS status; shift 2
    [ "$limit" -lt $((end - SECONDS)) ] || limit=$((end - SECONDS))
    if [ "$limit" -lt 5 ]; then echo "== $name: no time left"; return 1; fi
    timeout -k 25 "$limit" "$@" > "$work/part.log" 2>&1
    status=$?
    { echo "== $name: status $status, $((SECONDS - started)) s"; tail -c 40000 "$work/part.log"; } >> "$out/log.txt"
    echo "== $name: status $status, $((SECONDS - started)) s"
    return $status
}

peers() { # name, limit in seconds, seconds per row, rows
    local name=$1 limit=$2 seconds=$(($3 * slower)); shift 3
    part "$name" "$limit" "$python" benchmarks/peers.py ${tiny:+--tiny --repeats 2} --only "$@" --seconds "$seconds" \
        --work "$work/peers" --out "$out/peers.json" ${tiny:+--without compiled}
    "$python" benchmarks/peers.py --table --out "$out/peers.json" > "$out/peers.md" 2>> "$out/log.txt"
}

if ls .whl/*.whl > /dev/null 2>&1; then
    part wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$work/site" .whl/*.whl
    export PYTHONPATH=$PWD/$work/site:$PYTHONPATH
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null
gpu=$("$python" -c 'import torch; print("1" if torch.cuda.is_available() else "")')
[ $# -gt 0 ] || set -- check sampling training demo more
for what in "$@"; do
    case $what in
    check)
        if [ ! -f "$work/reference.json" ]; then
            CUDA_VISIBLE_DEVICES='' part reference 150 "$python" benchmarks/gpu_check.py reference --out "$work" ${tiny:+--tiny}
        fi
        part check 120 "$python" benchmarks/gpu_check.py check --out "$work" ${tiny:+--tiny}
        cp "$work/check.json" "$out" 2> /dev/null
        grep -hE "^(FAIL|[0-9]+ of)" "$work/part.log" | cut -c1-300
        ;;
    sampling) peers sampling 130 55 $([ "$gpu" ] && echo sd15-1 sd15-decode || echo sample-1 decode) ;;
    training) peers training 110 100 $([ "$gpu" ] && echo train-sd15 || echo train-ldm) ;;
    demo)
        data=$work/shapes runs=$work/demo steps=
        [ -z "$tiny" ] || steps="--steps 3 --batch-size 8 --validate-every 3"
        rm -rf "$runs"
        part data 40 "$python" scripts/make_dataset.py shapes --out "$data" --size 32 --seed 0 \
            --train "$([ "$tiny" ] && echo 64 || echo 20000)" --test "$([ "$tiny" ] && echo 16 || echo 1000)"
        part clip 40 "$python" scripts/train_clip.py configs/shapes/clip.yaml --data "$data" --out "$runs/clip" $steps
        part vae 40 "$python" scripts/train_vae.py configs/shapes/vae.yaml --data "$data" --out "$runs/vae" $steps
        part ldm 100 "$python" scripts/train_ldm.py configs/shapes/ldm.yaml --data "$data" --vae "$runs/vae/model" \
            --text-encoder "$runs/clip/model" --out "$runs/ldm" $steps  # at its limit, it saves its weights and ends
        part report 40 "$python" scripts/evaluate.py --model "$runs/ldm/model" --data "$data" --split test \
            --out "$runs/report" ${tiny:+--prompts 2 --images 8 --likelihoods 2 --steps 2}
        cp "$runs/report/report.json" "$runs/report/samples.png" "$out" 2> /dev/null
        ;;
    more)
        rows="sd15-16 sample-1 sample-16 train-ldm train-vae-gan first"
        peers more 300 90 $([ "$gpu" ] && echo $rows || echo encode train-vae-gan first)
        ;;
    *) echo "unknown part $what: check, sampling, training, demo or more"; exit 2 ;;
    esac
done
