"""The numbers that no formula gives: measured, cited or assumed, each with where it is from.

Measured ones are from one H200 (docs/evidence.md). Assumed ones err on the side of too much memory.
"""

from recipe.plan.hardware import GIB

# Bytes of a GPU.
CUDA_CONTEXT = int(0.6 * GIB)
"""A process's memory on a GPU outside torch's allocator. Assumed."""
CUBLAS_WORKSPACE = 32 << 20
"""cuBLAS's default on Hopper, allocated by torch (its documentation of CUBLAS_WORKSPACE_CONFIG)."""
NCCL_COMMUNICATOR = 192 << 20
"""Buffers of one NCCL communicator, which a process has for each group that it communicates in. Assumed."""
EXPERT_IMBALANCE = 1.5
"""Rows that the busiest rank's experts get, over the mean, where experts are spread over ranks. Assumed."""
FRAGMENTATION = 0.06
"""Share of the activations that torch's allocator holds besides and cannot use. Assumed."""
SGLANG_META, SGLANG_PER_TOKEN, SGLANG_PER_8_GPUS = 512 << 20, int(1.5 * 2**20), GIB
"""SGLang's own reserve for activations (0.5.21, `pre_capture_activation_reserve_mb`): 512 MB, 1.5 MB a token of a
prefill chunk, 1 GB for every 8 GPUs of an engine."""
SGLANG_LEAST_CHUNK = 2048
SGLANG_CHUNK = 8192
"""SGLang's default chunked_prefill_size on GPUs of 80 GB; with attention data parallelism it is divided by dp_size."""
SGLANG_GRAPHS, SGLANG_GRAPHS_PER_SEQUENCE = GIB, 2 << 20
"""CUDA graphs: a pool, and a part for every sequence of the largest batch captured. Assumed."""
SGLANG_GRAPH_BATCH = 160
"""Largest batch that is captured where --sglang-cuda-graph-max-bs-decode does not say. Assumed."""
SGLANG_DRAFT = 2 << 30
"""Buffers of a draft worker (SGLang's own reserve for EAGLE). Cited from its server arguments."""
SGLANG_FRACTION = 0.85
"""mem_fraction_static where --sglang-mem-fraction-static does not say, about what SGLang picks itself. Assumed."""
RELEASED_ENGINE = int(0.8 * GIB)
"""What an engine keeps on a GPU, beside its context and communicators, when it has released its memory. Assumed."""

# Bytes of a machine.
RANK_HOST = 6 * 10**9
"""Host memory of a training process: torch, CUDA, NCCL, Ray. Assumed."""
ENGINE_HOST = 8 * 10**9
"""Host memory of an engine's process of one GPU. Assumed."""
DRIVER_HOST = 10 * 10**9
"""Ray, the run itself, graders, data and the operating system. Assumed."""

# Rates, as shares of what the data sheet says.
TRAINING_SHARE, RECOMPUTING_SHARE = 0.385, 0.346
"""Shares of the bf16 FLOP/s that forward and backward reach, without recomputation and with all of it: 381 and 342 of
the H200's 989 TFLOP/s, measured."""
HOST_ADAM_BYTES = 29.6
"""Bytes of host memory that CPU Adam moves a parameter: 0.344 s a billion parameters at 86 GB/s, measured."""
GPU_ADAM_BYTES = 36
"""Bytes of GPU memory that AdamW and the norm before it move a parameter; measured: 41.8 ms for 3.9 billion parameters,
0.7 of the H200's bandwidth."""
GPU_ADAM_SHARE = 0.7
LINK_SHARE = 0.7
"""Share of a link's bandwidth that collective operations reach. Assumed."""
PCIE_SHARE = 0.85
"""Share of PCIe's bandwidth that copies reach. Assumed."""
PACKING_LOSS = 1.13
"""Time of a step over that of equally full packs, where expert parallelism makes ranks wait at every pack: 9 to 17%
by `scripts/simulate_packing.py`."""
DECODE_SHARE = 0.5
"""Share of GPU memory bandwidth that reading weights and cache reaches while decoding. Assumed."""
DECODE_LAYER_S = 60e-6
"""Latency of a layer in one decoding step: kernels, and exchange of tokens between experts. Assumed."""
TAIL = 1.3
"""Time of a rollout over that of full batches: the longest responses decode alone. Assumed."""
UPDATE_BUCKET_S = 0.02
"""Time of an engine to take one bucket of weights, beside copying it. Assumed."""
MEAN_RESPONSE = 0.5
"""Mean length of a response over the longest allowed. Assumed; --response-len says better."""
MEAN_PROMPT = 256
"""Mean tokens of a prompt. Assumed, as of mathematical problems in a chat template."""
LONGEST_PROMPT = 2048
"""Tokens of the longest prompt, where --rollout-max-prompt-len does not say. Assumed."""
CPU_DRIVER_HOST, CPU_PROCESS_HOST = 10**9, 6 * 10**8
"""Host memory without a GPU: of Ray and the run, and of each rank or engine, of which 0.4 GB were measured."""
MANY_CHECKPOINTS = 4
"""More of them at once than this are worth a word, where the disk is not known."""
SHARED_MEMORY_PER_GPU = 128 << 20
"""Bytes of /dev/shm: NCCL's buffers of trainer and engine for a GPU. Assumed."""
SGLANG_QUEUES = 2 * 6 * (4 << 20)
"""Bytes of /dev/shm of an engine of several GPUs: rings of 6 messages of 4 MiB, for all of its processes and for those
that share tensors (0.5.21, `parallel_state.py`)."""
TIGHT = 0.03
"""A margin below this share of the memory is worth a word."""

SLOT_ELEMENTS = 4 << 20
"""Elements of a pinned staging buffer of CPU Adam: gradients leave and weights return in pieces of this size, small
enough that a piece is still in the CPU's cache when its weights are rounded, large enough for all threads."""
OBJECT_STORE_BYTES = 256 << 20
"""Size of Ray's object store: enough for the samples of a rollout; weights never pass through Ray."""
