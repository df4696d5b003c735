"""The numbers that no formula gives: measured, cited or assumed, each with where it is from.

Measured ones are from H200s (docs/evidence.md, docs/benchmarks.md). Assumed sizes err on the side of too much memory;
rates that are not measured have both ends.
"""

from recipe.plan.hardware import GIB
from recipe.plan.ranges import Between

# Bytes of a GPU.
CUDA_CONTEXT = int(0.6 * GIB)
"""A process's memory on a GPU outside torch's allocator. Assumed."""
CUBLAS_WORKSPACE = 32 << 20
"""cuBLAS's default on Hopper, allocated by torch (its documentation of CUBLAS_WORKSPACE_CONFIG)."""
NCCL_COMMUNICATOR = 512 << 20
"""Buffers of one NCCL communicator, which a process has for each group that it communicates in: SGLang's log tells 1.07
GB for an engine's two, measured on two H200s."""
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
RELEASED_ENGINE, RELEASED_ENGINE_OF_SEVERAL = 2 * GIB, int(5.6 * GIB)
"""What an engine of one GPU, and of several, keeps on a GPU beside its context and communicators when it has released
its memory: measured on an H200, and on two with attention data parallelism in a loop's second and later steps."""
RELEASED_DRAFTS = int(1.5 * GIB)
"""What one that drafts keeps besides, the graphs of its draft worker for one: measured on two H100s likewise."""

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
TRAINING_LOSS = Between(1.0, 1.35)
"""Time of training in the loop over that by those shares: up to 1.35 was measured in loops on two H200s, before the
trainer left cores to SGLang."""
HOST_ADAM_BYTES = 29.6
"""Bytes of host memory that CPU Adam moves a parameter: 0.344 s a billion parameters at 86 GB/s, measured."""
GPU_ADAM_BYTES = 36
"""Bytes of GPU memory that AdamW and the norm before it move a parameter; measured: 41.8 ms for 3.9 billion parameters,
0.7 of the H200's bandwidth."""
GPU_ADAM_SHARE = 0.7
LINK_SHARE = 0.7
"""Share of a link's bandwidth that weights reach on their way to engines: within 2% on two H200s."""
EXCHANGE_SHARE = Between(0.8, 0.4)
"""Share of a link's bandwidth that the trainer's collective operations reach. Assumed."""
PCIE_SHARE = 0.85
"""Share of PCIe's bandwidth that copies reach. Assumed."""
PACKING_LOSS = Between(1.09, 1.17)
"""Time of a step over that of equally full packs, where expert parallelism makes ranks wait at every pack, by
`scripts/simulate_packing.py`."""
DECODE_SHARE = Between(0.8, 0.6)
"""Share of GPU memory bandwidth that reading weights reaches while decoding. Assumed; 0.8 fits one H200 with random
weights."""
CONTEXT_SHARE, TRITON_CONTEXT_SHARE = Between(0.6, 0.11), Between(0.35, 0.11)
"""Share that attention's reading of the cache reaches while decoding. Triton's kernels were measured on H200s: 0.11 to
0.15 for 8 to 64 sequences of a GPU, 0.35 for 128. Better at best, assumed, by kernels made for MLA, which SGLang takes
on H100s of its own; at worst as slow, as a public figure of this model on one H100 has it: 660 tokens/s of 32 sequences
with 8,192 tokens before them."""
TRITON_VERIFY_SHARE = 0.012
"""The same where drafts are verified by Triton's kernels: 0.008 to 0.012 for 8 to 64 sequences on one H200."""
DECODE_LAYER_S, DECODE_STEP_S = 0.11e-3, 1.0e-3
"""A layer's time in one decoding step, however little it has to do, and a step's own: 7.8 ms a token of one sequence in
all 47 layers and 2.2 ms of 32 in 3 layers, less what is read, on one H200."""
DECODE_FLOPS_SHARE = 0.45
"""Share of the bf16 FLOP/s that a decoding step's products reach: 256 sequences on one H200."""
DECODE_EXPERTS_APART = Between(0.07, 1.0)
"""How far tokens of one step ask for experts of their own: 1 as if each drew its own; at best as with random weights on
H200s, where 32 sequences read a seventh of all experts."""
DECODE_EXCHANGE_S = Between(0.0, 0.05e-3)
"""What a layer takes more in an engine of several GPUs. Two H200s with DP attention took no more for a step of all 47
layers than one with half of their sequences; more GPUs at worst, assumed."""
DECODE_TURN_S = Between(3.6e-3, 6.0e-3)
"""What SGLang's processes of an engine of several GPUs need to prepare a step, beside the step before it: 3.7 to 5.7 ms
a step were measured on pairs of H200s in 6 layers, which by themselves take less."""
EAGER_LAYER_S = Between(0.1e-3, 0.4e-3)
"""What a layer takes more beyond the largest CUDA graph. Assumed."""
DRAFT_ACCEPTANCE = Between(0.77, 0.5)
"""Share of a chain's drafts that are accepted where those before them were: 77% in a public run of MTP in RL; 2.0 to
2.8 tokens a verification in `make smoke`."""
DRAFT_COST = Between(1.05, 1.6)
"""Time of drafting and verifying over that of a pass over as many tokens, reading the cache apart: 1.0 to 1.5 for 1 to
64 sequences on one H200."""
SGLANG_REQUESTS = 2048
"""Requests that SGLang runs at once, where --sglang-max-running-requests does not say, at least."""
UPDATE_BUCKET_S = Between(0.01, 0.02)
"""Time of an engine to take one bucket of weights, beside copying it: 0.22 to 0.27 s for all 15 of 6 layers on one
H200. At worst assumed."""
UPDATE_GROUP_S = 1.4
"""Time to form, use first and leave the group in which weights are broadcast to engines on GPUs of their own: what an
update took on two H200s, 1.6 s, beside its bytes over NVLink and its buckets."""
MEAN_RESPONSE = 0.5
"""Mean length of a response over the longest allowed. Assumed; --response-len says better."""
RESPONSE_SPREAD = 0.6
"""Standard deviation of responses' lengths over their mean. Assumed; --response-spread says better."""
EVAL_PROMPTS = 30
"""Prompts of an evaluation whose file is not there: as many as AIME has."""
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
TUNED_MARGIN = 0.06
"""Share of the memory that tuned settings leave: the memory of rollouts was within 6% of the plan on two H200s."""

SLOT_ELEMENTS = 4 << 20
"""Elements of a pinned staging buffer of CPU Adam: gradients leave and weights return in pieces of this size, small
enough that a piece is still in the CPU's cache when its weights are rounded, large enough for all threads."""
LEAST_OBJECT_STORE = 256 << 20
"""Size of Ray's object store at least, in bytes."""
LARGEST_OBJECT_STORE = 8 << 30
"""Above 10 GB Ray does not start where /dev/shm has less."""
TRAIN_SAMPLE_BYTES = 33
"""Of a token of a sample on its way to the ranks: id and source of 8 bytes, advantage and three log-probs of 4, mask of
1; where it is replayed, its routing comes besides."""
