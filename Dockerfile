# Images of the service, one target per kind of device:
#
#   docker build --target cuda -t registry.example.com/twotower:0.1.0 .
#   docker run --gpus 2 --shm-size 8g -p 9000:9000 -v DIR:/models/mine registry.example.com/twotower:0.1.0 \
#       serve --model /models/mine --device cuda --dtype bfloat16
#
#   docker build --target cpu --build-arg TORCH_INDEX_URL=... -t twotower:cpu .
#   docker run --shm-size 2g -p 9000:9000 twotower:cpu
#
# Packages go into the system's Python: KubeRay starts Ray in a login shell, which forgets a PATH that
# names a virtual environment. Their versions are those of constraints.txt.
ARG PYTHON=3.12.12-slim-bookworm

FROM python:${PYTHON} AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    OMP_NUM_THREADS=1 \
    RAY_USAGE_STATS_ENABLED=0
# /models is where a volume of checkpoints is mounted.
RUN useradd --create-home --uid 1000 --shell /bin/bash twotower \
    && install --directory --owner=twotower /models
EXPOSE 9000
ENTRYPOINT ["twotower"]
CMD ["serve"]

# The default index has torch with the libraries of CUDA. The index of PyTorch's CPU builds, given as
# TORCH_INDEX_URL, makes the image several gigabytes smaller.
FROM base AS cpu
ARG TORCH_INDEX_URL=
COPY . /opt/twotower
RUN pip install -c /opt/twotower/constraints.txt \
        ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch \
    && pip install -c /opt/twotower/constraints.txt /opt/twotower
USER 1000
WORKDIR /home/twotower

# Triton compiles the launchers of its kernels with the host's C compiler; the driver comes from the
# NVIDIA container runtime.
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Debian keeps the newest version of a package alone, so there is none to name.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY . /opt/twotower
RUN pip install -c /opt/twotower/constraints.txt /opt/twotower
USER 1000
WORKDIR /home/twotower
