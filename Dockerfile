# The image of the recipe: CUDA, Python, the packages of one lock with their hashes, and this source.
# `invoke image` builds it and says where it came from; `docker build .` makes the same without a commit.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:0eee3094c71518ad31d011a594ae6ed6de72959ee07e318cb31cffe71690e90c
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

# Triton and torch.compile build kernels at run time: a compiler and Python's headers. SGLang's kernels load libnuma.
# Versions are the base image's distribution's, which keeps no old ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ gcc libc6-dev libnuma1 make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG LOCK=requirements/gpu.lock
COPY ${LOCK} /opt/recipe/packages.lock
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-input --require-hashes --no-deps --only-binary :all: \
        -r /opt/recipe/packages.lock

# Whoever the container runs as finds a home.
RUN useradd --create-home --uid 10001 recipe \
    && chmod 1777 /home/recipe

# Kernels that are compiled at their first use stay in build/, which outlives the container: that saves SGLang a minute
# at every further start.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/home/recipe \
    USER=recipe \
    PYTHONPATH=/workspace \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/workspace/build/cache/inductor \
    TRITON_CACHE_DIR=/workspace/build/cache/triton \
    FLASHINFER_WORKSPACE_BASE=/workspace/build/cache \
    SGLANG_CACHE_DIR=/workspace/build/cache/sglang \
    TVM_FFI_CACHE_DIR=/workspace/build/cache/tvm-ffi

WORKDIR /workspace
COPY . .
RUN mkdir build runs \
    && chmod 1777 . build runs \
    && python -m compileall -q recipe evaluation

ARG BASE_IMAGE
ARG GIT_COMMIT=unknown
ARG SOURCE_DATE_EPOCH=0
ARG BUILD_DATE=1970-01-01T00:00:00Z
RUN python -m recipe.container.provenance \
        --base-image "${BASE_IMAGE}" --commit "${GIT_COMMIT}" --source-date-epoch "${SOURCE_DATE_EPOCH}"
LABEL org.opencontainers.image.title="glm-flash-grpo" \
      org.opencontainers.image.description="GRPO post-training of GLM-4.7-Flash" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.revision="${GIT_COMMIT}" \
      org.opencontainers.image.created="${BUILD_DATE}"

USER 10001
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 \
    CMD ["python", "-m", "recipe.container.health"]
CMD ["make", "help"]
