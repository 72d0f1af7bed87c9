"""SGLang flags that this project does not have, and what to do about each, so that a launch line that is carried over
fails with the way out instead of "unknown flag"."""

from __future__ import annotations

_LATER = "not supported yet; drop it"
_KERNELS = "kernels are chosen from what the device's plugin offers: see `sglang-core explain`, override with --kernel OP=PROVIDER"
_RUNTIME = "graphs, compilation and their shapes belong to the device's plugin; drop it"
_LOGS = "not supported; --log-level, --log-requests and /metrics are what there is"

_ONE_BY_ONE = {
    "--attention-backend": "use --kernel attn.paged=PROVIDER",
    "--prefill-attention-backend": "use --kernel attn.paged=PROVIDER",
    "--decode-attention-backend": "use --kernel attn.paged=PROVIDER",
    "--sampling-backend": "use --kernel sample.sample=PROVIDER",
    "--enable-deterministic-inference": "use --deterministic",
    "--enable-cache-report": "cached tokens are always reported; drop it",
    "--enable-mixed-chunk": "prefill and decode always share steps; drop it",
    "--enable-priority-scheduling": "use --schedule-policy priority",
    "--max-prefill-tokens": "use --chunked-prefill-size, the new tokens of a step",
    "--disable-piecewise-cuda-graph": "use --prefill-graph-tokens 0",
    "--piecewise-cuda-graph-max-tokens": "use --prefill-graph-tokens",
    "--base-gpu-id": "use --device NAME:INDEX",
    "--log-level-http": "use --log-level",
    "--skip-server-warmup": "there is no warm-up request to skip; drop it",
    "--allow-auto-truncate": "a prompt that is too long is refused with the numbers, never cut; drop it",
    "--incremental-streaming-output": "the OpenAI routes stream what is new, /generate the whole text; drop it",
    "--grammar-backend": "structured output is not supported yet; drop it",
    "--model-loader-extra-config": "safetensors are read directly and need no loader settings; drop it",
    "--download-dir": "set HF_HOME for where hub downloads go",
    "--json-model-override-args": "edit config.json in a local model folder",
    "--tokenizer-mode": "the fast tokenizer is used where there is one; drop it",
    "--enable-lora-overlap-loading": "adapters are always read beside the steps; drop it",
    "--lora-eviction-policy": "the least recently used adapter leaves first; drop it",
    "--lora-drain-wait-threshold": "an adapter's turn comes after a bounded number of others; drop it",
    "--max-lora-chunk-size": "it belongs to a kernel that is not here; drop it",
    "--numa-node": "the device's plugin places its threads; see --num-threads",
}

_GROUPS = (
    (
        "replicas (--dp-size) share no layer so far",
        "--enable-dp-attention --enable-dp-lm-head",
    ),
    (
        "only tensor and expert parallelism on one machine so far (--tp-size, --ep-size)",
        "--pipeline-parallel-size --pp-size --pp --pp-max-micro-batch-size --pp-async-batch-depth "
        "--attention-context-parallel-size --attn-cp-size "
        "--moe-data-parallel-size --moe-dp-size --moe-dense-tp-size --nnodes --node-rank --dist-init-addr "
        "--nccl-init-addr --nccl-port --gpu-id-step --enable-dynamic-chunking",
    ),
    (
        _RUNTIME,
        "--disable-cuda-graph --disable-cuda-graph-padding --cuda-graph-max-bs --cuda-graph-bs "
        "--enable-profile-cuda-graph --enable-cudagraph-gc --enable-torch-compile "
        "--enable-torch-compile-debug-mode --torch-compile-max-bs "
        "--enforce-piecewise-cuda-graph --piecewise-cuda-graph-tokens --piecewise-cuda-graph-compiler "
        "--enable-p2p-check --enable-nccl-nvls --enable-symm-mem "
        "--enable-torch-symm-mem --disable-custom-all-reduce --enable-mscclpp",
    ),
    (
        _KERNELS,
        "--mm-attention-backend --dsa-prefill-backend --dsa-decode-backend --nsa-prefill-backend "
        "--nsa-decode-backend --fp8-gemm-backend --fp4-gemm-backend --moe-runner-backend --moe-a2a-backend "
        "--disable-flashinfer-autotune --flashinfer-mxfp4-moe-precision --enable-flashinfer-allreduce-fusion "
        "--enable-aiter-allreduce-fusion --triton-attention-reduce-in-fp32 --triton-attention-num-kv-splits "
        "--triton-attention-split-tile-size --flashinfer-mla-disable-ragged --enable-fused-qk-norm-rope "
        "--disable-shared-experts-fusion --disable-chunked-prefix-cache --enable-fp32-lm-head --lora-backend "
        "--speculative-moe-runner-backend --speculative-moe-a2a-backend --speculative-draft-attention-backend",
    ),
    (
        f"speculative decoding is {_LATER}",
        "--speculative-algorithm --speculative-draft-model-path --speculative-draft-model "
        "--speculative-draft-model-revision --speculative-draft-load-format --speculative-num-steps "
        "--speculative-eagle-topk --speculative-num-draft-tokens --speculative-accept-threshold-single "
        "--speculative-accept-threshold-acc --speculative-token-map --speculative-attention-mode "
        "--speculative-draft-model-quantization --speculative-ngram-min-bfs-breadth "
        "--speculative-ngram-max-bfs-breadth --speculative-ngram-match-type "
        "--speculative-ngram-max-trie-depth --speculative-ngram-capacity --enable-multi-layer-eagle",
    ),
    (
        f"tool calls and reasoning parsers are {_LATER}",
        "--tool-call-parser --reasoning-parser --tool-server",
    ),
    (
        f"embedding, multimodal and diffusion models are {_LATER}",
        "--is-embedding --enable-multimodal --multi-item-scoring-delimiter --keep-mm-feature-on-device "
        "--disable-fast-image-processor --encoder-only --language-only --encoder-transfer-backend "
        "--encoder-urls --enable-precise-embedding-interpolation --dllm-algorithm --dllm-algorithm-config",
    ),
    (
        f"prefill/decode disaggregation is {_LATER}",
        "--disaggregation-mode --disaggregation-transfer-backend --disaggregation-bootstrap-port "
        "--disaggregation-ib-device --disaggregation-decode-enable-offload-kvcache "
        "--disaggregation-decode-polling-interval --num-reserved-decode-tokens",
    ),
    (
        f"cache tiers and offloading are {_LATER}",
        "--enable-hierarchical-cache --hicache-ratio --hicache-size --hicache-write-policy "
        "--hicache-io-backend --hicache-mem-layout --hicache-storage-backend "
        "--hicache-storage-prefetch-policy --hicache-storage-backend-extra-config --enable-lmcache "
        "--cpu-offload-gb --offload-group-size --offload-num-in-group --offload-prefetch-step --offload-mode "
        "--enable-memory-saver --enable-weights-cpu-backup --enable-draft-weights-cpu-backup",
    ),
    (
        f"mixture-of-experts and recurrent models are {_LATER}",
        "--deepep-mode --deepep-config --deepep-dispatcher-output-dtype --ep-num-redundant-experts "
        "--ep-dispatch-algorithm --init-expert-location --enable-eplb --eplb-algorithm "
        "--eplb-rebalance-num-iterations --eplb-rebalance-layers-per-chunk "
        "--eplb-min-rebalancing-utilization-threshold --expert-distribution-recorder-mode "
        "--expert-distribution-recorder-buffer-size --enable-expert-distribution-metrics "
        "--elastic-ep-backend --mooncake-ib-device --max-mamba-cache-size --mamba-ssm-dtype "
        "--mamba-full-memory-ratio --mamba-scheduler-strategy --mamba-track-interval "
        "--swa-full-tokens-ratio --disable-hybrid-swa-memory --enable-two-batch-overlap "
        "--enable-single-batch-overlap --tbo-token-distribution-threshold",
    ),
    ("scales of cached keys and values are read from the checkpoint's tensors; drop it", "--quantization-param-path"),
    (
        "use --quantization fp8, int8 or int4, or a checkpoint that was quantised otherwise; drop it",
        "--modelopt-quant --quantize-and-serve --torchao-config --enable-quant-communications",
    ),
    (
        _LOGS,
        "--log-requests-level --log-requests-format --log-requests-target --crash-dump-folder "
        "--uvicorn-access-log-exclude-prefixes --show-time-cost --enable-mfu-metrics "
        "--enable-metrics-for-all-schedulers --tokenizer-metrics-custom-labels-header "
        "--tokenizer-metrics-allowed-custom-labels --bucket-time-to-first-token --bucket-inter-token-latency "
        "--bucket-e2e-request-latency --collect-tokens-histogram --prompt-tokens-buckets "
        "--generation-tokens-buckets --gc-warning-threshold-secs --decode-log-interval "
        "--enable-request-time-stats-logging --kv-events-config --enable-trace --otlp-traces-endpoint "
        "--export-metrics-to-file --export-metrics-to-file-dir",
    ),
    (
        f"it is {_LATER}",
        "--schedule-conservativeness --prefill-max-requests --schedule-low-priority-values-first "
        "--abort-on-priority-when-disabled --priority-scheduling-preemption-threshold "
        "--num-continuous-decode-steps --scheduler-recv-interval --sleep-on-idle --soft-watchdog-timeout "
        "--model-impl --model-checksum --weight-version --hf-chat-template-name --completion-template "
        "--file-storage-path --sampling-defaults --preferred-sampling-params --fastapi-root-path --grpc-mode "
        "--warmups --checkpoint-engine-wait-weights-before-ready --tokenizer-worker-num "
        "--enable-tokenizer-batch-encode --disable-tokenizer-batch-decode --enable-dynamic-batch-tokenizer "
        "--dynamic-batch-tokenizer-batch-size --dynamic-batch-tokenizer-batch-timeout "
        "--constrained-json-whitespace-pattern --constrained-json-disable-any-whitespace "
        "--disable-outlines-disk-cache --enable-custom-logit-processor --enable-return-hidden-states "
        "--enable-return-routed-experts --rl-on-policy-target --enable-nan-detection --delete-ckpt-after-loading "
        "--custom-weight-loader --debug-tensor-dump-output-folder --debug-tensor-dump-layers "
        "--debug-tensor-dump-input-file --debug-tensor-dump-inject --custom-sigquit-handler "
        "--enable-prefill-delayer --enable-layerwise-nvtx-marker",
    ),
)

UNSUPPORTED = _ONE_BY_ONE | {flag: reason for reason, flags in _GROUPS for flag in flags.split()}


def why_unsupported(flag: str) -> str | None:
    """What to do about an SGLang flag that is not ours; None for any other word."""
    name = flag.replace("_", "-")
    return (
        f"{name} is an SGLang flag that sglang-core does not have: {UNSUPPORTED[name]}" if name in UNSUPPORTED else None
    )
